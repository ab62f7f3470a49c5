"""Tensors in a file, with failures to write told as the OSErrors that they are."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# there is no way to read it but to set it, which is best done once, before there are threads
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which whoever may read other new files may read.

    Raises:
        OSError: it can't be written (a full disk, say). safetensors' own error is none, so whoever minds full disks and
            missing folders would not catch it.
    """
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        code = error_number(error) or errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(0o666 & ~_UMASK)  # safetensors leaves it to its owner alone: others couldn't use an adapter


def error_number(error: SafetensorError) -> int | None:
    """The operating system's number of a failure, which safetensors gives in its text alone; None: it has none."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
