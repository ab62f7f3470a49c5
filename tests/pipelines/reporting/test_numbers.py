"""What the report computes: seeds, comparisons, categories, ablations, and the paper's columns."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.statistics import Bootstrap, mean, paired_difference, verdict
from pipelines.report import write_report
from pipelines.reporting.gather import gather
from pipelines.reporting.methods import Methods
from pipelines.reporting.plots import write_plots
from pipelines.reporting.published import SideBySide, published
from pipelines.reporting.results_tables import benchmark_tables
from pipelines.reporting.validation import by_source, validation_table
from tests.pipelines.synthetic_run import BACKBONE, BENCHMARKS, MEANS, STRATEGIES, VALIDATED, SyntheticRun

HOW = Bootstrap(300, 0)
FINAL = ("ifeval", "hotpotqa_em", "gpqa", "mab", "locomo")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SyntheticRun:
    """tsw gains on the frozen backbone under full, msw loses, and the control lies between."""
    changes = {"benchmarks": {name: BENCHMARKS[name] for name in ("locomo", "hotpotqa")}}
    run = SyntheticRun(tmp_path_factory.mktemp("run"), **changes).finish()
    full = {"tsw": 0.6, "msw": 0.4, "lora_without_context": 0.5}
    for strategy, value in full.items():
        for seed in (42, 43):
            run.evaluate(BACKBONE, strategy, seed, "locomo", means={**MEANS, "full": value})
    return run


@pytest.fixture(scope="module")
def results(run):
    return gather(run.config)


def scores(run, strategy, seed, condition, metric="f1") -> pd.Series:
    records = pq.read_table(run.layout.records(BACKBONE, strategy, seed, "locomo")).to_pandas()
    return records[records["condition"] == condition].set_index("question_id")[metric].sort_index()


def clusters(run) -> pd.Series:
    records = pq.read_table(run.layout.records(BACKBONE, "tsw", 42, "locomo")).to_pandas()
    return records.drop_duplicates("question_id").set_index("question_id")["cluster_id"].sort_index()


def row(results, **values) -> dict:
    numbers = results.numbers
    for column, value in {"benchmark": "locomo", "metric": "f1", "category": "", **values}.items():
        numbers = numbers[numbers[column] == value]
    assert len(numbers) == 1
    return numbers.iloc[0].to_dict()


def test_seeds_are_averaged_by_question(run, results):
    by_seed = [scores(run, "tsw", seed, "state") for seed in (42, 43)]
    expected = mean((by_seed[0] + by_seed[1]) / 2, clusters(run), HOW)
    found = row(results, method="tsw", kind="condition", name="state")
    assert [found[name] for name in ("value", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    assert [found["seed_low"], found["seed_high"]] == pytest.approx(sorted(s.mean() for s in by_seed))
    assert (found["n"], found["clusters"], found["seeds"]) == (40, 10, "42 43")


def test_one_seed_has_the_intervals_of_its_evaluation(run, results):
    told = json.loads(run.layout.evaluation(BACKBONE, "frozen", 0, "locomo").read_text())
    for condition in ("none", "full"):
        for metric in ("f1", "nll"):
            found = row(results, method="frozen", kind="condition", name=condition, metric=metric)
            expected = told["conditions"][condition][metric]
            assert [found[k] for k in ("value", "low", "high")] == pytest.approx(
                [expected[k] for k in ("value", "low", "high")]
            )
            assert np.isnan(found["seed_low"])


@pytest.mark.parametrize(
    ("name", "method", "condition", "other", "other_condition"),
    [
        ("full_vs_frozen", "tsw", "full", "frozen", "full"),
        ("full_vs_frozen", "msw", "full", "frozen", "full"),
        ("full_vs_control", "context2lora", "full", "lora_without_context", "full"),
        ("state_vs_control", "tsw", "state", "lora_without_context", "none"),
        ("state_vs_none", "msw", "state", "msw", "none"),
        ("state_pair", "tsw", "state", "msw", "state"),
    ],
)
@pytest.mark.parametrize("metric", ["f1", "nll"])
def test_comparisons_are_paired(run, results, name, method, condition, other, other_condition, metric):
    def average(strategy, condition):
        seeds = (0,) if strategy == "frozen" else (42, 43)
        return sum(scores(run, strategy, seed, condition, metric) for seed in seeds) / len(seeds)

    sign = -1 if metric == "nll" else 1
    ours, theirs = sign * average(method, condition), sign * average(other, other_condition)
    expected = paired_difference(ours, theirs, clusters(run), HOW)
    found = row(results, kind="comparison", name=name, method=method, against=other, metric=metric)
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    assert found["verdict"] == verdict(expected)


def test_verdicts_follow_the_truth(results):
    found = {
        method: row(results, kind="comparison", name="full_vs_frozen", method=method)["verdict"]
        for method in ("tsw", "msw", "lora_without_context")
    }
    assert found == {"tsw": "better", "msw": "worse", "lora_without_context": "can't tell at n = 40"}


def test_the_two_halves_of_the_matrix_mirror_each_other(results):
    tables = {table.title: table for table in benchmark_tables(results, BACKBONE, "locomo")}
    table = tables["Method against method under full, F1"]
    (_, names), cells = table.groups[0], {row.label: row.cells for row in table.rows}
    assert names == ["frozen", "bm25", "context2lora", "lora_without_context", "tsw", "msw"]
    tsw, msw = cells["tsw"][names.index("msw")], cells["msw"][names.index("tsw")]
    assert (tsw.verdict, msw.verdict) == ("better", "worse")
    assert msw.text == f"−{tsw.text}"
    assert cells["tsw"][names.index("tsw")].text == "–"


def test_categories_are_their_questions(run, results):
    records = pq.read_table(run.layout.records(BACKBONE, "frozen", 0, "locomo")).to_pandas()
    chosen = records[(records["category"] == "temporal") & (records["condition"] == "full")]
    found = row(results, method="frozen", kind="category", name="full", category="temporal")
    assert (found["n"], found["value"]) == (10, pytest.approx(chosen["f1"].mean()))


def test_numbers_of_facts_are_in_their_order_and_make_lines(tmp_path):
    facts = {"facts": {"kind": "facts", "version": 1}}
    run = SyntheticRun(tmp_path, benchmarks=facts, seeds=[42], register={"champion_metric": "facts/memory_effect_nll"})
    results = gather(run.finish().config)
    inside = results.numbers[(results.numbers["kind"] == "category") & (results.numbers["metric"] == "exact_match")]
    assert list(dict.fromkeys(inside["category"])) == ["1 fact", "2 facts", "8 facts", "16 facts"]
    made = write_plots(run.config, results, tmp_path)
    words, svg = made[f"scores-{BACKBONE}-facts"]
    assert words == "Scores by number of facts" and "<!-- facts told -->" in svg
    assert svg.index("<!-- 2 -->") < svg.index("<!-- 8 -->") < svg.index("<!-- 16 -->")


def test_recall_of_a_chat_is_drawn_by_facts_and_by_turns_since(tmp_path):
    chat = {"chat": {"kind": "chat_recall", "version": 1}}
    run = SyntheticRun(tmp_path, benchmarks=chat, seeds=[42], register={"champion_metric": "chat/memory_effect_nll"})
    made = write_plots(run.config, gather(run.finish().config), tmp_path)
    _, svg = made[f"scores-{BACKBONE}-chat"]
    assert "<!-- facts told -->" in svg and "<!-- recalled -->" in svg
    words, svg = made[f"retention-{BACKBONE}-chat"]
    assert words == "Scores by number of turns since" and "<!-- turns since -->" in svg
    assert svg.index("<!-- tsw, 2 told -->") < svg.index("<!-- tsw, 4 told -->")
    assert svg.index("<!-- 0 -->") < svg.index("<!-- 8 -->")
    assert "<!-- swapped -->" in svg and "<!-- unrelated -->" not in svg, "the legend names what was asked"


def test_the_curve_shows_when_memory_forms(run, results, tmp_path):
    words, svg = write_plots(run.config, results, tmp_path)["loss"]
    assert words == "Answer NLL (nats per token) and NLL swapped − state by optimiser step"
    assert "<!-- answer NLL (nats per token) -->" in svg and "<!-- NLL swapped − state -->" in svg
    # where it couldn't be measured there is no empty panel
    unknown = {cell: curve.assign(memory_effect=float("nan")) for cell, curve in results.curves.items()}
    _, svg = write_plots(run.config, replace(results, curves=unknown), tmp_path)["loss"]
    assert "<!-- answer NLL (nats per token) -->" in svg and "swapped" not in svg


# --- ablations -----------------------------------------------------------------------------------------------


def adapter(**fields) -> dict:
    return {"adapter": {"strategy": "tsw", **fields}}


def test_ablations_are_told_by_what_differs(tmp_path):
    strategies = STRATEGIES | {
        "ssw": adapter(strategy="ssw"),
        "sentences": adapter(strategy="ssw", segment="sentence"),
        "heads_q": adapter(steer=["q"]),
        "heads_all": adapter(steer=["q", "k", "v", "o"]),
        "depth_last": adapter(layers="last_third"),
        "depth_first": adapter(layers="first_third"),
        "rank_4": adapter(rank=4, alpha=8.0),
        "rank_16": adapter(rank=16),
        "states_2": adapter(strategy="msw", num_states=2),
        "longer": adapter() | {"train": {"epochs": 3}},
        "several": adapter(rank=4, steer=["q"]),
    }
    methods = Methods(SyntheticRun(tmp_path, strategies=strategies).config)
    assert methods.groups() == {
        "heads": [("q", "heads_q"), ("qo", "tsw"), ("qkvo", "heads_all")],
        "depth": [("first third", "depth_first"), ("last third", "depth_last"), ("all", "tsw")],
        "rank": [("4", "rank_4"), ("8", "tsw"), ("16", "rank_16")],
        "states": [("1", "tsw"), ("2", "states_2"), ("4", "msw")],
        "write": [("token", "tsw"), ("sentence", "sentences"), ("message", "ssw")],
        "train.epochs": [("3", "longer"), ("as configured", "tsw")],
    }
    assert methods.plain == "tsw"
    assert set(methods.main) == {"frozen", *STRATEGIES, "ssw", "several"}
    assert methods.adaptation_control == "lora_without_context"


def test_a_run_without_ablations_has_no_groups(run):
    assert Methods(run.config).groups() == {}


def test_what_was_wrong_with_a_benchmarks_data_is_told(tmp_path):
    run = SyntheticRun(tmp_path, benchmarks={"locomo": BENCHMARKS["locomo"]}, seeds=[42]).finish()
    for strategy, seed in (("frozen", 0), ("tsw", 42)):
        path = run.layout.evaluation(BACKBONE, strategy, seed, "locomo")
        result = json.loads(path.read_text()) | {"records": {"repeated": ["q1"], "renamed": [*"abcde"]}}
        path.write_text(json.dumps(result))
    assert gather(run.config).damage[BACKBONE, "locomo"] == [
        "q1: more than once in the data, word for word; asked once",
        "a, b, c and 2 more: id of different records; all but the first get a number after theirs",
    ]
    assert "In its data: q1: more than once" in write_report(run.config).read_text(encoding="utf-8")


def test_the_last_validation_is_told_by_source_and_drawn(tmp_path):
    changes = {"benchmarks": {"locomo": BENCHMARKS["locomo"]}, "strategies": {"tsw": STRATEGIES["tsw"]}}
    run = SyntheticRun(tmp_path, **changes).finish()
    assert validation_table(gather(run.config), BACKBONE) is None
    run.layout.curve(BACKBONE, "tsw", 42).write_text(VALIDATED)
    run.layout.curve(BACKBONE, "tsw", 43).write_text(VALIDATED.replace("2.25", "2.75"))
    results = gather(run.config)
    table = validation_table(results, BACKBONE)
    assert [source for source, _ in table.groups] == ["papers", "chat"]
    cells = [cell.plain() for cell in table.rows[0].cells]
    assert cells == ["2.500 seeds 2.250 to 2.750", "0.125 seeds 0.125 to 0.125", "4.000 seeds 4.000 to 4.000", "–"]
    assert list(by_source(results.curves[BACKBONE, "tsw", 42])["papers"]["step"]) == [2, 3]
    _, svg = write_plots(run.config, results, tmp_path)["validation"]
    for words in ("papers", "chat", "held-out NLL (nats per token)", "NLL swapped − state"):
        assert f"<!-- {words} -->" in svg
    page = write_report(run.config).read_text(encoding="utf-8")
    assert "Held-out questions at the end of training" in page


def test_further_conditions_are_shown_where_they_were_asked(tmp_path):
    asked = {"evaluate": {"use_gpu": False, "bootstrap_samples": 300, "conditions": ["state", "swapped", "permuted"]}}
    changes = {"benchmarks": {"locomo": BENCHMARKS["locomo"]}, "seeds": [42], "strategies": {"tsw": STRATEGIES["tsw"]}}
    run = SyntheticRun(tmp_path, **changes, **asked).finish()
    run.evaluate(BACKBONE, "tsw", 42, "locomo", means={"state": 0.3, "swapped": 0.2, "permuted": 0.1})
    results = gather(run.config)
    found = row(results, method="tsw", kind="effect", name="layer_effect")
    assert found["verdict"] == "better" and found["value"] == pytest.approx(0.2, abs=0.05)
    tables = {table.title: table for table in benchmark_tables(results, BACKBONE, "locomo")}
    assert tables["Scores"].groups[0][1] == ["none", "state", "swapped", "permuted", "full"]
    assert [name for name, _ in tables["Effects of the memory"].groups] == ["memory effect", "layer effect"]


# --- the paper's tables --------------------------------------------------------------------------------------


def test_the_published_rows_add_up():
    """Every Final is the mean of its five columns, but TSW's, which the page says."""
    rows = published()["main"]["rows"]
    for name, entry in rows.items():
        values = [rows["frozen"][c] if entry[c] == "as frozen" else entry[c] for c in FINAL]
        difference = 0.50 if name == "tsw" else 0.0
        assert entry["final"] == pytest.approx(np.mean(values) + difference, abs=0.0101), name
    assert "51.66" in published()["main"]["notes"][0]
    for settings in published()["ablations"].values():
        for entry in settings.values():
            assert entry["mean"] == pytest.approx((entry["hotpotqa_em"] + entry["locomo"]) / 2, abs=0.0101)


def table_of(run, title):
    tables = {table.title: table for table in SideBySide(run.config, gather(run.config)).tables()}
    return tables[title]


def test_ours_stand_beside_the_papers(run, results):
    table = table_of(run, "The paper's table")
    assert [name for name, _ in table.groups] == ["published: Qwen3-4B-Instruct", f"ours: {BACKBONE}"]
    assert table.groups[1][1] == ["HotpotQA EM, n = 40", "HotpotQA F1, n = 40", "LoCoMo, n = 40", "Final"]
    cells = {row.label: row.cells for row in table.rows}
    tsw = row(results, method="tsw", kind="condition", name="full")
    assert cells["δ-mem TSW"][6].text == "46.53"
    assert cells["δ-mem TSW"][10].text == f"{100 * tsw['value']:.2f}"
    assert cells["δ-mem TSW"][11] == ("–", "", "", "", "no IFEval, GPQA-D, MAB")
    assert cells["BM25 RAG"][0].text == "as frozen"
    assert {cell.text for cell in cells["MemGen"][8:]} == {"–"}
    state = table_of(run, "Without any context in the prompt")
    assert [row.cells[-1].text for row in state.rows][2] != "–", "the swapped state, which the paper lacks"


@pytest.mark.parametrize("protocol", ["official", "release"])
def test_memory_agent_bench_counts_competencies_alike_or_by_the_release_questions(tmp_path, protocol):
    mab = {"mab": {"kind": "memory_agent_bench", "version": 1, "protocol": protocol}}
    register = {"champion_metric": "mab/memory_effect_nll"}
    run = SyntheticRun(tmp_path, benchmarks=mab, seeds=[42], register=register).finish()
    run.evaluate(BACKBONE, "tsw", 42, "mab", questions=41)  # one of the four competencies has a question more
    records = pq.read_table(run.layout.records(BACKBONE, "tsw", 42, "mab")).to_pandas()
    full = records[records["condition"] == "full"]
    of_competencies = full.groupby("category")["score"].mean()
    assert of_competencies.mean() != full["score"].mean()
    expected = full["score"].mean() if protocol == "release" else of_competencies.mean()
    table = table_of(run, "The paper's table")
    cells = {row.label: row.cells for row in table.rows}["δ-mem TSW"]
    _, headings = table.groups[-1]
    ours = dict(zip((name.partition(",")[0] for name in headings), cells[-len(headings) :], strict=True))
    assert ours["MAB"].text == f"{100 * expected:.2f}"
    assert ours["MAB TTL"].text == f"{100 * of_competencies['TTL/icl_banking77']:.2f}"


def test_final_needs_all_five(tmp_path):
    extra = {
        "gpqa": {**BENCHMARKS["ifeval"], "task": "gpqa_diamond_cot_zeroshot"},
        "mab": {"kind": "memory_agent_bench", "version": 1},
    }
    strategies = {name: STRATEGIES[name] for name in ("tsw", "bm25")}
    run = SyntheticRun(tmp_path, strategies=strategies, benchmarks=BENCHMARKS | extra, seeds=[42]).finish(20, 5)
    table = table_of(run, "The paper's table")
    columns = dict(zip(published()["columns"], range(8, 16), strict=True))
    for label in ("δ-mem TSW", "BM25 RAG"):
        cells = {row.label: row.cells for row in table.rows}
        frozen, cells = cells["frozen backbone"], cells[label]
        assert (cells[columns["ifeval"]].text == "as frozen") == (label == "BM25 RAG")
        used = [frozen if cells[columns[c]].text == "as frozen" else cells for c in FINAL]
        values = [float(source[columns[c]].text) for source, c in zip(used, FINAL, strict=True)]
        assert float(cells[columns["final"]].text) == pytest.approx(np.mean(values), abs=0.011)
