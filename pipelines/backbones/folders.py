"""Backbones that already are folders: a repository on the Hugging Face Hub, or a local folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipelines.config.backbones import HubBackbone, LocalBackbone
from pipelines.errors import StageError

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def fetch_hub(spec: HubBackbone, folder: Path) -> str:
    """Downloads through the Hub's own cache, so that an interrupted download goes on; returns the commit."""
    snapshot = _download(spec, _SMALL_FILES)
    require_causal_lm(snapshot, spec.id)  # before the gigabytes
    snapshot = _download(spec, _SMALL_FILES + _WEIGHTS)
    _take_files(snapshot, folder, spec.id)
    return snapshot.name


def fetch_local(spec: LocalBackbone, folder: Path) -> None:
    """Takes the model files of a folder that `save_pretrained` wrote."""
    source = Path(spec.path)
    if not source.is_dir():
        raise StageError(f"The backbone folder {source} does not exist. Correct `path` in its configuration.")
    require_causal_lm(source, str(source))
    _take_files(source, folder, str(source))


def require_causal_lm(folder: Path, what: str) -> None:
    """Raises StageError unless the folder's config.json describes a causal language model of transformers."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{what} has no configuration that transformers can read: {error}") from error
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]
    if not classes.intersection(named):
        raise StageError(f"{what} is a {named[0]}, not a causal language model. Choose a decoder such as Qwen3.")


def _download(spec: HubBackbone, patterns: list[str]) -> Path:
    try:
        return Path(
            snapshot_download(spec.id, revision=spec.revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except GatedRepoError as error:
        raise StageError(f"{spec.id} is gated: accept its terms on the Hub and log in with `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise StageError(f"{spec.id} has no revision {spec.revision!r} on the Hugging Face Hub.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise StageError(
            f"There is no model {spec.id!r} on the Hugging Face Hub, or it is private. Correct `id` in the "
            "backbone's configuration."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise StageError(
            f"The Hugging Face Hub can't be reached, and {spec.id} is not in its local cache. Connect to the "
            "network, or use a backbone of source local, package or random."
        ) from error


def _take_files(source: Path, folder: Path, what: str) -> None:
    weights = [path for pattern in _WEIGHTS for path in source.glob(pattern)]
    if not weights:
        raise StageError(f"{what} has no safetensors weights; other formats are not loaded. Convert it first.")
    for path in weights + [path for pattern in _SMALL_FILES for path in source.glob(pattern)]:
        _link_or_copy(path.resolve(), folder / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # no second copy of many gigabytes where one disk holds both
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
