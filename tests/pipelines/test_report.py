"""The report of finished and unfinished runs."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from pipelines.errors import StageError
from pipelines.register import choose_champion, register_cell
from pipelines.report import write_report
from pipelines.report_data import gather
from pipelines.report_plots import write_plots
from pipelines.run_status import jobs, summary


class Page(HTMLParser):
    """Collects the addresses a page loads and refers to, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "data") if name in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []

    def handle_data(self, data):
        self.text += f"{data} "


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_stands_alone_and_shows_every_cell(finished_run):
    run = finished_run()
    page = read(write_report(run.config))
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert all(link.startswith("#") or (run.layout.report / link).exists() for link in page.links)
    text = " ".join(page.text.split())
    assert "tiny-random msw 42 5.000 [4.900, 5.100] 4.000" in text
    assert "not finished" in text, "nothing is registered yet"
    assert "better the right history" in text
    assert " nan " not in text


def test_registered_models_are_named(finished_run):
    run = finished_run(strategies=["tsw"])
    register_cell(run.config, "tiny-random", "tsw", 42)
    choose_champion(run.config, "tiny-random")
    text = read(write_report(run.config)).text
    assert '"models:/deltamem-tiny-random@champion"' in text
    assert "not finished" not in text


def test_answers_are_shown_as_text(finished_run):
    page = read(write_report(finished_run().config))
    assert "<b>swapped</b> answer 0" in page.text


def test_the_table_keeps_full_precision(finished_run):
    run = finished_run()
    write_report(run.config)
    table = pd.read_csv(run.layout.report / "table.csv", keep_default_na=False)
    row = table[(table["strategy"] == "msw") & (table["name"] == "memory_effect")].iloc[0]
    assert (float(row["value"]), row["metric"], float(row["low"])) == (1.5, "nll", 1.4)
    frozen = table[table["strategy"] == "frozen"]
    assert set(frozen["name"]) == {"none", "full"}


def test_markdown_has_a_row_per_cell(finished_run):
    run = finished_run()
    write_report(run.config)
    text = (run.layout.report / "table.md").read_text(encoding="utf-8")
    assert "| tiny-random | frozen | 0 | 5.000 [4.900, 5.100] | – | – | 3.000" in text
    rows = [line for line in text.splitlines() if line.startswith("| tiny-random")]
    assert len(rows) == 6
    assert {line.count("|") for line in rows} == {8, 10}, "F1 has no effects"


def test_an_undefined_effect_says_why(finished_run):
    run = finished_run(strategies=["tsw"])
    path = run.layout.evaluation("tiny-random", "tsw", 42, "qasper")
    nothing = '{"value": null, "low": null, "high": null, "n": 40, "note": "full is not clearly above none"}'
    path.write_text(re.sub(r'("context_recovery_nll": ){[^}]*}', rf"\1{nothing}", path.read_text()))
    text = " ".join(read(write_report(run.config)).text.split())
    assert "undefined full is not clearly above none" in text


def test_an_effect_around_zero_is_not_sold(finished_run):
    run = finished_run(strategies=["tsw"])
    run.evaluate("tiny-random", "tsw", 42, effect=0.05)
    assert "can't tell at n = 40" in " ".join(read(write_report(run.config)).text.split())


def test_a_failed_cell_is_named_with_its_reason(finished_run):
    run = finished_run()
    run.layout.adapter_weights("tiny-random", "msw", 42).unlink()
    log = run.layout.log("train", "tiny-random", "msw", "seed42")
    log.parent.mkdir(parents=True)
    log.write_text("step 3\nerror: the disk is full\n")
    text = " ".join(read(write_report(run.config)).text.split())
    assert "train tiny-random msw seed42 : error: the disk is full" in text
    assert "tiny-random tsw 42 5.000" in text
    assert "tiny-random msw 42 5.000" not in text, "the evaluation of an adapter that is gone"
    told = summary(run.config)
    assert "train tiny-random msw seed42" in told
    assert str(log) in told
    assert "1 × evaluate" in told


def test_a_run_with_nothing_done_has_a_report(finished_run, tmp_path):
    run = finished_run(name="empty", results_dir=str(tmp_path / "other"))
    empty = run.config.model_copy(update={"results_dir": str(tmp_path / "nothing")})
    assert {job.state for job in jobs(empty)} == {"waiting"}
    assert "Nothing has been evaluated yet" in read(write_report(empty)).text


def test_the_same_results_give_the_same_plots(finished_run, tmp_path):
    results = gather(finished_run().config)
    (tmp_path / "again").mkdir()
    first, second = write_plots(results, tmp_path), write_plots(results, tmp_path / "again")
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)


def test_a_broken_result_is_named(finished_run):
    run = finished_run()
    path = run.layout.evaluation("tiny-random", "tsw", 42, "qasper")
    path.write_text("{")
    with pytest.raises(StageError, match=re.escape(str(path))):
        write_report(run.config)


def test_command_line_says_what_is_wrong(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("name: x\nbackbone: [a]\n")
    command = [sys.executable, "-m", "pipelines.report", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "backbone: unknown key; did you mean 'backbones'?" in result.stderr
    assert "Traceback" not in result.stderr
