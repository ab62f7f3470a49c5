"""What a run still lacks, and what it will cost: ``python -m pipelines.doctor --configfile configs/paper.yaml``.

Looks at data, access to gated repositories, disk, memory, GPUs and attention kernels, and ends with 1 where something
is missing. It fetches nothing and starts nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.config import resolve_config
from pipelines.config.files import read_layers
from pipelines.diagnosis.cost import Costs, estimate_costs, rows
from pipelines.diagnosis.findings import Finding
from pipelines.diagnosis.inputs import look_at_inputs
from pipelines.diagnosis.machine import look_at_machine
from pipelines.errors import run_stage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}


@app.command()
def main(
    configfile: Annotated[list[Path], typer.Option(help="Configuration file; more of them are laid over the first.")],
) -> None:
    """Say what a configuration needs, what of it is missing here, and about what its run will cost."""
    config = resolve_config(read_layers(configfile, {}), " + ".join(map(str, configfile)))
    costs = estimate_costs(config)
    findings, to_fetch = look_at_inputs(config)
    findings += look_at_machine(config, costs, to_fetch)
    console = Console()
    console.print(_needs(findings), _cost(costs))
    if costs.uncounted:
        console.print(f"Not counted: {', '.join(costs.uncounted)}.")
    missing = sum(finding.state == "missing" for finding in findings)
    console.print(f"{missing} of {len(findings)} things are missing." if missing else "Nothing is missing.")
    raise typer.Exit(1 if missing else 0)


def _needs(findings: list[Finding]) -> Table:
    table = Table(title="What it needs", title_justify="left")
    for heading in ("what", "", "how it is"):
        table.add_column(heading, overflow="fold")  # a path that is cut can't be looked for
    for what, state, told in findings:
        table.add_row(what, f"[{_COLOURS[state]}]{state}[/]", told)
    return table


def _cost(costs: Costs) -> Table:
    title = "About what it will cost, in hours of an H100 (estimated, not measured here)"
    table = Table("backbone", "parameters", "jobs", "training", "evaluation", title=title, title_justify="left")
    for row in rows(costs):
        table.add_row(*row)
    return table


if __name__ == "__main__":
    run_stage(app)
