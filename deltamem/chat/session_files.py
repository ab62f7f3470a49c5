"""Saved sessions: a folder of safetensors files and one JSON file.

- ``session.json``: what the folder holds: messages, tokens, settings, digests, and the names of the other files
- ``keys-<random>.safetensors``: keys and values of consecutive tokens; together, in order, they are the whole cache
- ``memory-<random>.safetensors``: the memory, as :meth:`deltamem.memory.DeltaMemory.save` writes it

An engine that keeps no caches (vLLM's) saves none: the files of keys are missing then, all of them, and the tokens are
read anew when the chat goes on elsewhere.

A save writes new files under new names, then replaces session.json, then removes what it no longer names. So a crash at
any moment leaves the old session or the new one, and saving after a turn costs only that turn's tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState, StoredPart
from deltamem.decoding.key_values import KeyValues
from deltamem.errors import MemoryMismatchError, SnapshotError
from deltamem.memory import DeltaMemory
from deltamem.tensor_files import save_tensors

FORMAT = "deltamem-session"
MANIFEST = "session.json"
_OURS = re.compile(r"(keys|memory)-[0-9a-f]{16}\.safetensors|session\.json\.[0-9a-f]{8}\.partial")
# More files than this are merged into one by the next save.
_MOST_PARTS = 64


def save(runtime: ChatRuntime, state: ChatState, folder: Path, settings: dict[str, Any]) -> ChatState:
    """Write ``state`` to ``folder``; when this returns, it is on the disk.

    Args:
        settings: JSON values kept beside the state.

    Returns:
        The same state, which now knows the files that hold its cache.

    Raises:
        OSError: the folder can't be written; what was saved there before is still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    try:
        parts, memory = _write_tensors(state, folder)
        manifest = {
            "format": FORMAT,
            "format_version": 1,
            "adapter_digest": runtime.adapter_digest,
            "backbone_digest": runtime.backbone_digest,
            "dtype": str(runtime.model.dtype),
            "settings": settings,
            "messages": list(state.messages),
            "start": state.start,
            "tokens": list(state.tokens),
            "memory": {"file": memory, "sha256": _file_digest(folder / memory)},
            "keys": [{k: v for k, v in asdict(part).items() if k != "folder"} for part in parts],
        }
        partial = folder / f"{MANIFEST}.{secrets.token_hex(4)}.partial"
        _write_text(partial, json.dumps(manifest, ensure_ascii=False))
    except OSError:
        _remove(folder, keep=before)  # on a full disk, what is of no use must not fill it
        raise
    os.replace(partial, folder / MANIFEST)
    _sync(folder)
    _remove(folder, keep={MANIFEST, memory, *(part.file for part in parts)})
    return replace(state, parts=tuple(parts))


def _write_tensors(state: ChatState, folder: Path) -> tuple[list[StoredPart], str]:
    """The parts of the state's cache, those now written among them, and the memory's new file."""
    parts = _reusable(state, folder)
    held = sum(part.tokens for part in parts)
    if held < state.keys.length:
        parts.append(_write_part(state.keys.cut(held, state.keys.length), folder))
    memory = f"memory-{secrets.token_hex(8)}.safetensors"
    state.memory.save(folder / memory)
    _sync(folder / memory)
    return parts, memory


def _remove(folder: Path, keep: set[str]) -> None:
    """Remove what saves have written to the folder."""
    for path in folder.iterdir():
        if path.name not in keep and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def holds_another_chat(folder: Path, state: ChatState) -> bool:
    """Whether saving this chat to the folder would replace one that isn't an earlier or later moment of it."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        saved = read_manifest(folder)["messages"]
    except SnapshotError:  # damaged, or not a session's
        return True
    common = min(len(saved), len(state.messages))
    return bool(saved) and (not common or saved[:common] != list(state.messages[:common]))


def load(runtime: ChatRuntime, folder: Path) -> ChatState:
    """Read a state that :func:`save` wrote.

    Raises:
        SnapshotError: the folder is missing or damaged, or was saved with another adapter or backbone.
    """
    manifest = read_manifest(folder)
    for what in ("adapter", "backbone"):
        ours, theirs = getattr(runtime, f"{what}_digest"), manifest[f"{what}_digest"]
        if ours != theirs:
            raise SnapshotError(
                f"{folder} was saved with another {what} (sha256 {theirs[:12]}…, this one is {ours[:12]}…): "
                f"its memory has no meaning here; load it with that {what}, or start a new session"
            )
    device = runtime.model.device
    try:
        memory = DeltaMemory.load(_verified(folder, manifest["memory"]), device)
        keys = KeyValues()
        for entry in manifest["keys"]:
            keys = keys.extend(_read_part(_verified(folder, entry), device))
    except (SafetensorError, MemoryMismatchError, OSError) as error:
        raise SnapshotError(f"{folder} is damaged: {error}") from error
    if manifest["keys"] and keys.length != len(manifest["tokens"]):
        raise SnapshotError(f"{folder} is damaged: {keys.length} tokens in its files, {len(manifest['tokens'])} named")
    return ChatState(
        memory=memory,
        messages=tuple(manifest["messages"]),
        start=manifest["start"],
        tokens=tuple(manifest["tokens"]),
        keys=keys,
        parts=tuple(StoredPart(folder=str(folder.resolve()), **entry) for entry in manifest["keys"]),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of session.json.

    Raises:
        SnapshotError: there is none, or it isn't one.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SnapshotError(f"{folder} holds no saved session (no {MANIFEST})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SnapshotError(f"{path} can't be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SnapshotError(f"{path} is not a saved session (its 'format' is not {FORMAT!r})")
    if manifest.get("format_version") != 1:
        raise SnapshotError(f"{path}: format_version {manifest.get('format_version')!r} is not known; known: 1")
    return manifest


def memory_file(folder: Path) -> Path:
    """The file that holds a saved session's memory."""
    return _verified(folder, read_manifest(folder)["memory"])


def _reusable(state: ChatState, folder: Path) -> list[StoredPart]:
    """The files of an earlier save to this folder that hold a beginning of the state's cache."""
    parts, held = [], 0
    for part in state.parts[:_MOST_PARTS]:
        held += part.tokens
        if part.folder != str(folder.resolve()) or held > state.keys.length or not (folder / part.file).is_file():
            break
        parts.append(part)
    return [] if len(parts) == _MOST_PARTS else parts


def _write_part(keys: KeyValues, folder: Path) -> StoredPart:
    name = f"keys-{secrets.token_hex(8)}.safetensors"
    tensors = {}
    for index, (k, v) in enumerate(keys.layers):
        # contiguous copies the slice alone; a view would drag its whole storage along
        tensors[f"keys.{index}"], tensors[f"values.{index}"] = k.cpu().contiguous(), v.cpu().contiguous()
    save_tensors(tensors, folder / name)
    _sync(folder / name)
    return StoredPart(str(folder.resolve()), name, keys.length, _file_digest(folder / name))


def _read_part(path: Path, device: torch.device) -> KeyValues:
    tensors = load_file(path, device=str(device))
    layers = range(len(tensors) // 2)
    return KeyValues(tuple((tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in layers))


def _verified(folder: Path, entry: dict[str, Any]) -> Path:
    """The file that a manifest names, if it is one of ours and unchanged."""
    if not _OURS.fullmatch(entry["file"]):
        raise SnapshotError(f"{folder / MANIFEST} names a file that no save writes: {entry['file']!r}")
    path = folder / entry["file"]
    if not path.is_file() or _file_digest(path) != entry["sha256"]:
        raise SnapshotError(f"{path} is missing or damaged (its sha256 is not the one in {MANIFEST})")
    return path


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # names its file only where that can't be opened
        raise OSError(error.errno, error.strerror, str(path)) from error
