"""deltamem convert: the public release's adapter format to this project's, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

EXAMPLE = "Example: deltamem convert public_release/ ours/"


def command(
    source: Annotated[
        str, typer.Argument(help="Adapter to convert: a folder of either format, a Hub id, or models:/NAME@ALIAS.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    public: Annotated[bool, typer.Option("--public", help="Write the public release's format (a pickle).")] = False,
) -> None:
    """Convert an adapter: from the public release to safetensors, or with --public the other way."""
    from deltamem.adapters import public_release
    from deltamem.adapters.files import load_adapter, require_free, save_adapter
    from deltamem.adapters.locate import locate

    require_free(target)
    config, tensors = load_adapter(locate(source))
    (public_release.write if public else save_adapter)(target, config, tensors)
    Console().print(f"{target}: {config.strategy}, {len(tensors)} tensors", soft_wrap=True)
