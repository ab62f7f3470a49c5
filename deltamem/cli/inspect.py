"""deltamem inspect: look into an adapter, a session or a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from deltamem.errors import DeltaMemError

EXAMPLE = "Example: deltamem inspect path/to/adapter --png gates.png"


def command(
    path: Annotated[str, typer.Argument(help="Adapter (folder, Hub id, models:/…), session folder or memory file.")],
    png: Annotated[Path | None, typer.Option(help="Draw a heat map of the states (of an adapter: its gates).")] = None,
) -> None:
    """Sizes, norms and gates per layer of an adapter, a saved session or a memory."""
    if png is not None and png.suffix.lower() != ".png":
        raise DeltaMemError(f"--png {png}: the picture is a PNG, so its name must end in .png")
    from deltamem.tools.inspection import inspect, save_picture

    inspection = inspect(path)
    console = Console()
    console.print(f"[bold]{inspection.title}[/bold]", soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    for name, value in inspection.facts.items():
        facts.add_row(name, value)
    console.print(facts)
    # narrow, so that ten columns fit 80 characters; a long heading is folded, a number never cut
    layers = Table(*inspection.columns, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in layers.columns:
        column.justify, column.overflow = "right", "fold"
    for row in inspection.rows:
        layers.add_row(*row)
    console.print(layers)
    if png is not None:
        save_picture(inspection, png)
        console.print(f"heat map: {png}", soft_wrap=True)
