"""deltamem average: several adapters as one, the mean of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

EXAMPLE = "Example: deltamem average mean/ adapters/chat/seed42 adapters/chat/seed43"


def command(
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    sources: Annotated[
        list[str], typer.Argument(help="Adapters that began at the same one: folders, Hub ids, or models:/NAME@ALIAS.")
    ],
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Round the weights to half the size.")] = False,
) -> None:
    """Average the weights of adapters, as of several seeds, into one that is often better than each."""
    import torch

    from deltamem.adapters.average import average_adapters
    from deltamem.adapters.files import require_free, save_adapter
    from deltamem.adapters.locate import locate
    from deltamem.adapters.names import without_limits

    require_free(target)
    config, tensors = average_adapters([locate(source) for source in sources])
    if bfloat16:
        tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in without_limits(tensors).items()}
    save_adapter(target, config, tensors)
    Console().print(f"{target}: the mean of {len(sources)} adapters", soft_wrap=True)
