"""Writes the report of a run: ``python -m pipelines.report --config configs/quickstart.yaml``.

The page ``results/<name>/report/index.html`` holds everything in one file. Beside it lie the plots, and the
tables as Markdown and CSV. A run that isn't finished gets a report of what is there, which names what is
missing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from pipelines import parts
from pipelines.config import Config, load_config
from pipelines.errors import run_stage
from pipelines.layout import Layout
from pipelines.model_store import tracking_uri
from pipelines.provenance import provenance
from pipelines.report_data import Results, gather
from pipelines.report_plots import write_plots
from pipelines.report_tables import markdown, tables, write_csv

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CONDITIONS = {
    "none": ("question", "empty", "What the model says from the question alone."),
    "state": ("question", "written from the right history", "What it says with its memory of the history."),
    "swapped": (
        "question",
        "written from another question's history",
        "The control: whatever this gains over none is adaptation to the task, not memory.",
    ),
    "full": ("history + question", "written from the history as it is read", "The paper's setting."),
}

VERDICTS = {
    "better": "the right history's memory beats another one's: it remembers",
    "worse": "the right history's memory does worse than another one's",
}


def write_report(config: Config) -> Path:
    """Writes the page, the plots and the tables of whatever is finished; returns the page."""
    layout, results = Layout(config), gather(config)
    layout.report.mkdir(parents=True, exist_ok=True)
    plots = write_plots(results, layout.report)
    shown = tables(results)
    write_csv(results, layout.report / "table.csv")
    (layout.report / "table.md").write_text(markdown(shown), encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("pipelines", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        config=config,
        results=results,
        tables=shown,
        conditions=CONDITIONS,
        plots={name: _inline(path) for name, path in plots.items()},
        findings=list(findings(results)),
        failed=[job for job in results.unfinished if job.state == "failed"],
        waiting=[job for job in results.unfinished if job.state == "waiting"],
        store=tracking_uri(config),
        provenance=provenance(parts.report(config)),
        settings=config.to_json(),
    )
    layout.report_page.write_text(page, encoding="utf-8")
    return layout.report_page


def findings(results: Results) -> Iterator[dict[str, Any]]:
    """What the memory effect of each cell says, in a sentence."""
    rows = results.numbers[(results.numbers["name"] == "memory_effect") & results.numbers["low"].notna()]
    for row in rows.to_dict("records"):
        yield {**row, "text": VERDICTS.get(row["verdict"], "the interval includes no effect at all")}


def _inline(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


@app.command()
def main(config: Annotated[Path, typer.Option(help="configuration, resolved or not")]) -> None:
    """Writes the report of a run."""
    page = write_report(load_config(config))
    Console().print(f"report: {page}", soft_wrap=True)


if __name__ == "__main__":
    run_stage(app)
