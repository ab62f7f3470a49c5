"""deltamem inspect: look into an adapter, a session or a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from deltamem.cli import loading
from deltamem.errors import DeltaMemError

EXAMPLE = "Example: deltamem inspect path/to/adapter --png gates.png"


def command(
    path: Annotated[str, typer.Argument(help="Adapter (folder, Hub id, models:/…), session folder or memory file.")],
    png: Annotated[
        Path | None,
        typer.Option(callback=loading.home, help="Draw a heat map of the states (of an adapter: its gates)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            callback=loading.home,
            help="Backbone (a folder or a Hub id): measure how much an adapter steers each of its layers, too.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            callback=loading.home, help="With --base: a text file that is written and read. Default: a short story."
        ),
    ] = None,
    device: loading.DeviceOption = None,
    dtype: loading.DtypeOption = "auto",
) -> None:
    """Sizes, norms and gates per layer of an adapter, a saved session or a memory."""
    if text is not None and base is None:
        raise DeltaMemError("--text is what --base is measured on: name the backbone, too")
    if png is not None and png.suffix.lower() != ".png":
        raise DeltaMemError(f"--png {png}: the picture is a PNG, so its name must end in .png")
    from deltamem.tools.inspection import inspect, save_picture

    inspection = inspect(path)
    if base is not None:
        inspection = _measured(inspection, path, base, text, device, dtype)
    console = Console()
    console.print(f"[bold]{inspection.title}[/bold]", soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    for name, value in inspection.facts.items():
        facts.add_row(name, value)
    console.print(facts)
    # narrow, so that thirteen columns fit 80 characters; a long heading is folded, a number never cut
    layers = Table(*inspection.columns, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in layers.columns:
        column.justify, column.overflow = "right", "fold"
    for row in inspection.rows:
        layers.add_row(*row)
    console.print(layers)
    if png is not None:
        save_picture(inspection, png)
        console.print(f"heat map: {png}", soft_wrap=True)


def _measured(inspection, path: str, base: str, text: Path | None, device: str | None, dtype: str):
    """The inspection of an adapter with how much it steers a backbone that reads a text it has written.

    Raises:
        DeltaMemError: it isn't an adapter, or the text can't be read or is empty.
    """
    model, tokenizer = loading.load(base, path, None, device, dtype)
    import torch

    from deltamem.tools.inspection import with_ratios
    from deltamem.tools.steering_ratios import SAMPLE, steering_ratios

    try:
        words = SAMPLE if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaMemError(f"--text {text}: it can't be read ({error})") from error
    ids = tokenizer(words, return_tensors="pt").input_ids.to(model.device)
    return with_ratios(inspection, steering_ratios(model, ids, segment_ids=torch.zeros_like(ids)))
