"""The report of finished and unfinished runs: its page, plots and files."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from pipelines.errors import StageError
from pipelines.registry.registration import choose_champion, register_cell
from pipelines.report import write_report
from pipelines.reporting.charts import PAPER
from pipelines.reporting.gather import gather
from pipelines.reporting.plots import DECLARED, write_plots
from pipelines.run.status import jobs, summary
from tests.pipelines.synthetic_run import BACKBONE, MEANS, STRATEGIES, SyntheticRun

LOCOMO = {"kind": "locomo", "version": 1, "file": "locomo10.json"}


class Page(HTMLParser):
    """Collects what a page loads and refers to, its ids, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.links, self.ids, self.text = [], [], set(), ""
        self.feed(text.replace("<wbr>", ""))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "data") if name in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()

    def handle_data(self, data):
        self.text += f"{data} "


def read(path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SyntheticRun:
    """Two seeds, baselines without training, LoRA without memory, and one evaluation that is missing."""
    run = SyntheticRun(tmp_path_factory.mktemp("run")).finish()
    run.layout.evaluation(BACKBONE, "tsw", 43, "hotpotqa").unlink()
    return run


@pytest.fixture(scope="module")
def page(run) -> Page:
    return read(write_report(run.config))


@pytest.fixture
def small(tmp_path) -> SyntheticRun:
    changes = {"strategies": {"tsw": STRATEGIES["tsw"]}, "benchmarks": {"locomo": LOCOMO}, "seeds": [42]}
    return SyntheticRun(tmp_path, **changes).finish()


def test_the_page_stands_alone(run, page):
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    pictures = [base64.b64decode(source.partition(",")[2]).decode() for source in page.sources]
    assert not any(PAPER in picture or "currentColor" not in picture for picture in pictures), (
        "its own background, its ink"
    )
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (run.layout.report / link).exists()
    assert " nan " not in page.text and "None" not in page.text


def test_every_plot_with_data_is_there(run, page):
    names = {path.stem for path in run.layout.report.glob("*.svg")}
    scores = {f"scores-{BACKBONE}-{benchmark}" for benchmark in ("locomo", "hotpotqa", "ifeval")}
    assert names == {*DECLARED, *scores, f"learning-{BACKBONE}", f"cost-{BACKBONE}"}
    assert len(page.sources) == len(names)


def test_the_losses_of_a_mixture_are_drawn_by_source(tmp_path):
    sources = {"chats": {"kind": "chat", "train_files": ["chats.jsonl"]}, "facts": {"kind": "generated"}}
    changes = {"strategies": {"tsw": STRATEGIES["tsw"]}, "benchmarks": {"locomo": LOCOMO}, "seeds": [42]}
    run = SyntheticRun(tmp_path, data={"sources": sources}, **changes).finish()
    header = "step,loss,answer_nll,answer_nll/chats,answer_nll/facts"
    run.layout.curve(BACKBONE, "tsw", 42).write_text(f"{header}\n1,3,3,2,\n2,2,2,,2.5\n")
    page = write_report(run.config).read_text(encoding="utf-8")
    assert 'alt="Answer NLL of chats and answer NLL of facts by optimiser step"' in page


def test_a_missing_seed_shows(page):
    hotpotqa = page.text.split(f"hotpotqa on {BACKBONE}")[1]
    assert re.search(r"tsw seed 42 [01]\.", hotpotqa)
    assert re.search(r"msw seeds 42, 43 [01]\.", hotpotqa)
    assert "job not run evaluate smollm2-135m-instruct tsw seed43 hotpotqa" in page.text.replace("jobs", "job")


def test_a_model_without_memory_has_no_memory_conditions(page):
    row = re.search(r"context2lora seeds 42, 43 (.*?) lora_without_context", page.text)[1]
    assert re.match(r"0\.\d+ \[.*?\] seeds \S+ to \S+ – – 0\.\d+", row)


def test_answers_are_shown_as_text(page):
    assert re.search(r"Zoë <b> swapped \d+", page.text)
    assert re.search(r"Who is № \d+\?", page.text) and "expected: forty-two or 42" in page.text


def test_costs_are_per_question(page):
    # 2 seconds for 40 questions; 100 tokens in 2 seconds; 1 GiB
    assert re.search(r"msw 0\.05 0\.05 0\.05 0\.05 0\.05 50 50 50 50 1\.00", page.text)


def test_the_table_keeps_full_precision(run, page):
    table = pd.read_csv(run.layout.report / "table.csv", keep_default_na=False, dtype=str)
    row = table[(table["method"] == "msw") & (table["benchmark"] == "locomo") & (table["kind"] == "effect")]
    row = row[(row["name"] == "memory_effect") & (row["metric"] == "f1")].iloc[0]
    assert len(row["value"]) > 10
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    assert float(row["seed_low"]) <= float(row["value"]) <= float(row["seed_high"])
    assert set(table[table["method"] == "frozen"]["kind"]) <= {"condition", "category", "comparison"}


def test_markdown_has_whole_rows(run, page):
    text = (run.layout.report / "table.md").read_text(encoding="utf-8")
    assert f"### locomo on {BACKBONE}: Scores" in text and "| msw (seeds 42, 43) | 0." in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1 and lines[0].count("|") <= 10, lines
    assert len(tables) > text.count("### "), "wide tables are split"


def test_an_undefined_effect_says_why(small):
    small.evaluate(BACKBONE, "tsw", 42, "locomo", means={**MEANS, "full": 0.05})
    assert re.search(r"undefined full − none is -0\.\S+ \[.*?\], not clearly above 0", text_of(small))


def test_an_effect_around_zero_is_not_sold(small):
    assert "can't tell" not in text_of(small).split("Memory effect on")[1].split("Context recovery")[0]
    small.evaluate(BACKBONE, "tsw", 42, "locomo", means={**MEANS, "swapped": MEANS["state"]})
    told = text_of(small).split("Memory effect on")[1].split("Context recovery")[0]
    assert "can't tell at n = 40" in told


def text_of(run: SyntheticRun) -> str:
    return read(write_report(run.config)).text


def test_shortened_prompts_are_told(small):
    path = small.layout.evaluation(BACKBONE, "frozen", 0, "locomo")
    path.write_text(path.read_text().replace('"shortened_to_the_window": 0', '"shortened_to_the_window": 40'))
    assert "50 % of the prompts under full had no room for the whole history" in text_of(small)


def test_a_failed_cell_is_named_with_its_reason(small):
    small.layout.adapter_weights(BACKBONE, "tsw", 42).unlink()
    log = small.layout.log("train", BACKBONE, "tsw", "seed42")
    log.parent.mkdir(parents=True)
    log.write_text("step 3\nerror: the disk is full\n")
    text = text_of(small)
    assert f"train {BACKBONE} tsw seed42 : error: the disk is full" in text
    assert "tsw seed 42" not in text, "the evaluation of an adapter that is gone"
    told = summary(small.config)
    assert f"train {BACKBONE} tsw seed42" in told and str(log) in told and "1 × evaluate" in told


def test_a_progress_bar_is_no_reason(small):
    small.layout.adapter_weights(BACKBONE, "tsw", 42).unlink()
    log = small.layout.log("train", BACKBONE, "tsw", "seed42")
    log.parent.mkdir(parents=True)
    for written, told in (
        ("KeyError: 'x'\n  0%|  | 0/9\n100%|██| 9/9\n", "KeyError: 'x'"),
        ("\n", "nothing in its log"),
    ):
        log.write_text(written)
        assert next(job for job in jobs(small.config) if job.state == "failed").reason() == told


def test_a_run_with_nothing_done_has_a_report(tmp_path):
    empty = SyntheticRun(tmp_path)
    assert {job.state for job in jobs(empty.config)} == {"waiting"}
    text = text_of(empty)
    assert "Nothing has been evaluated yet" in text and "51.66" in text
    assert {path.stem for path in empty.layout.report.glob("*.svg")} == set(DECLARED)


def test_the_same_results_give_the_same_plots(small, tmp_path):
    results = gather(small.config)
    (tmp_path / "again").mkdir()
    first, second = (write_plots(small.config, results, folder) for folder in (tmp_path, tmp_path / "again"))
    assert first == second and len(first) == 6


@pytest.mark.parametrize("kind", ["evaluation", "records"])
def test_a_broken_result_is_named(small, kind):
    path = getattr(small.layout, kind)(BACKBONE, "tsw", 42, "locomo")
    path.write_text("{")
    with pytest.raises(StageError, match=re.escape(str(path))):
        write_report(small.config)


def test_registered_models_are_named(finished_run):
    run = finished_run(strategies=["tsw"])
    register_cell(run.config, "tiny-random", "tsw", 42)
    choose_champion(run.config, "tiny-random")
    text = text_of(run)
    assert '"models:/deltamem-tiny-random@champion"' in text
    assert "not finished" not in text


def test_command_line_says_what_is_wrong(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("name: x\nbackbone: [a]\n")
    command = [sys.executable, "-m", "pipelines.report", "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "backbone: unknown key; did you mean 'backbones'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_curve_s_memory_effect_is_explained(page):
    assert "NLL swapped − state is the memory effect on a step's own questions" in page.text


def test_it_says_which_methods_have_no_memory_to_swap(page):
    told = "What context2lora, lora_without_context have learnt lies in weights"
    assert told in page.text and "asked under none and full alone" in page.text
