"""Writes the report of a run: ``python -m pipelines.report --config configs/quickstart.yaml``.

The page ``results/<name>/report/index.html`` holds everything in one file. Beside it lie the plots, and the
tables as Markdown and CSV. A run that isn't finished gets a report of what is there, which names what is
missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.config import Config, load_config
from pipelines.errors import run_stage
from pipelines.reporting.gather import gather
from pipelines.reporting.page import Contents, render
from pipelines.reporting.plots import write_plots
from pipelines.reporting.tables import markdown
from pipelines.run.files import room_to_write
from pipelines.run.layout import Layout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_report(config: Config) -> Path:
    """Writes the page, the plots and the tables of whatever is finished; returns the page."""
    layout, results = Layout(config), gather(config)
    with room_to_write(layout.report):
        layout.report.mkdir(parents=True, exist_ok=True)
        plots = write_plots(config, results, layout.report)
        contents = Contents.of(config, results)
        results.numbers.to_csv(layout.report / "table.csv", index=False)
        (layout.report / "table.md").write_text(markdown(contents.tables), encoding="utf-8")
        layout.report_page.write_text(render(config, results, contents, plots), encoding="utf-8")
    return layout.report_page


@app.command()
def main(config: Annotated[Path, typer.Option(help="Configuration file.")]) -> None:
    """Write the report of a run, of whatever is finished."""
    page = write_report(load_config(config))
    Console().print(f"report: {page}", soft_wrap=True)


if __name__ == "__main__":
    run_stage(app)
