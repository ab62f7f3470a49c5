"""The report's page: what it holds, in which order, and its rendering."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.config import Config
from pipelines.config.conditions import CONDITIONS
from pipelines.reporting.charts import INK, PAPER
from pipelines.reporting.costs import cost_tables, training_table
from pipelines.reporting.gather import Results
from pipelines.reporting.published import SideBySide, published
from pipelines.reporting.results_tables import benchmark_tables, overview
from pipelines.reporting.sources import backbone_loading, backbone_source, data_source
from pipelines.reporting.tables import Table
from pipelines.reporting.validation import validation_table
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance

DARK_INK = "#dfe5ec"


class Section(NamedTuple):
    """One benchmark on one backbone; ``anchor`` is its id in the page and part of its plots' names."""

    backbone: str
    benchmark: str
    shortened: float
    damage: list[str]
    tables: list[Table]

    @property
    def anchor(self) -> str:
        return f"{self.backbone}-{self.benchmark}"


@dataclass
class Contents:
    """Every table of the report, by where it stands."""

    overviews: list[Table]
    paper: list[Table]
    sections: list[Section]
    costs: list[Table]
    validation: list[Table]

    @classmethod
    def of(cls, config: Config, results: Results) -> Contents:
        overviews = [overview(results, backbone) for backbone in config.backbones]
        sections = [
            Section(*key, results.shortened[key], results.damage[key], list(benchmark_tables(results, *key)))
            for key in results.headlines
        ]
        costs = [table for backbone in config.backbones for table in cost_tables(results, backbone)]
        training = training_table(results)
        return cls(
            [table for table in overviews if table],
            list(SideBySide(config, results).tables()),
            sections,
            [*costs, *([training] if training else [])],
            [table for backbone in config.backbones if (table := validation_table(results, backbone))],
        )

    @property
    def tables(self) -> list[Table]:
        inside = [table for section in self.sections for table in section.tables]
        return [*self.overviews, *self.paper, *inside, *self.costs, *self.validation]


def render(config: Config, results: Results, contents: Contents, plots: Mapping[str, tuple[str, str]]) -> str:
    """The page as HTML. ``plots``: {name: (words, SVG)}."""
    environment = Environment(
        loader=PackageLoader("pipelines.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    samples = groupby(results.samples, key=lambda sample: (sample.backbone, sample.benchmark))
    return environment.get_template("report.html.j2").render(
        config=config,
        results=results,
        contents=contents,
        conditions={n: c for n, c in CONDITIONS.items() if c.by_default or n in config.evaluate.conditions},
        source=published()["source"],
        backbone_source=backbone_source,
        backbone_loading=backbone_loading,
        data_source=data_source,
        plots={name: (words, _inline(svg)) for name, (words, svg) in plots.items()},
        samples=[(*key, list(questions)) for key, questions in samples],
        failed=[job for job in results.unfinished if job.state == "failed"],
        waiting=[job for job in results.unfinished if job.state == "waiting"],
        store=Layout(config).store,
        provenance=provenance(parts.report(config)),
        settings=config.to_json(),
    )


def _inline(svg: str) -> str:
    """An SVG as an address that holds it, on the page's own background and with ink in the reader's colour scheme."""
    head, start, body = svg.partition("<defs>")
    style = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
    adaptive = head + style + start + body.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    return "data:image/svg+xml;base64," + base64.b64encode(adaptive.encode()).decode()
