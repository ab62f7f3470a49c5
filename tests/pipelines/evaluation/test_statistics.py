"""Intervals, effects and their signs, against hand-computed cases and known truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluation.results import Scores, condition_means, named_effects, total_cost
from pipelines.evaluation.statistics import (
    Bootstrap,
    Estimate,
    mean,
    means,
    paired_difference,
    recoveries,
    recovery,
    verdict,
)

QUICK = Bootstrap(samples=400)


def test_mean_weighs_questions_and_resamples_documents():
    # documents a: 1, 1, 1 and b: 5; the resamples of two documents are aa, ab, ba, bb
    found = mean([1, 1, 1, 5], ["a", "a", "a", "b"], Bootstrap(samples=4000))
    assert (found.value, found.n, found.clusters) == (2.0, 4, 2)
    assert (found.low, found.high) == (1.0, 5.0)


def test_documents_make_wider_intervals_than_questions():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    by_document = mean(values, [str(i // 10) for i in range(200)], QUICK)
    by_question = mean(values, [str(i) for i in range(200)], QUICK)
    assert by_document.high - by_document.low > 2 * (by_question.high - by_question.low)


def test_the_same_seed_gives_the_same_interval():
    values, clusters = np.arange(30.0), [str(i // 3) for i in range(30)]
    assert mean(values, clusters, QUICK) == mean(values, clusters, QUICK)
    assert mean(values, clusters, QUICK) != mean(values, clusters, Bootstrap(400, seed=1))


@pytest.mark.parametrize("per_document", [1, 4])
def test_intervals_cover_the_truth(per_document):
    random, documents, hits, trials = np.random.default_rng(3), 40, 0, 200
    clusters = np.repeat([str(i) for i in range(documents)], per_document)
    for trial in range(trials):
        shared = np.repeat(random.normal(size=documents), per_document)
        values = 0.3 + shared + random.normal(size=len(clusters))
        found = mean(values, clusters, Bootstrap(400, seed=trial))
        hits += found.low <= 0.3 <= found.high
    # 95 % is the aim; percentile intervals of 40 documents fall a little short of it
    assert 0.89 <= hits / trials <= 0.99


def test_pairing_removes_what_questions_have_in_common():
    random = np.random.default_rng(1)
    difficulty, clusters = random.normal(0, 10, 60), [str(i) for i in range(60)]
    a, b = difficulty + 0.5 + random.normal(0, 0.1, 60), difficulty
    found = paired_difference(a, b, clusters, QUICK)
    assert found.value == pytest.approx(np.mean(a - b))
    assert 0.4 < found.low < found.value < found.high < 0.6


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 4)), min_size=2, max_size=20))
def test_a_difference_is_antisymmetric(rows):
    a, b, clusters = zip(*rows, strict=True)
    names = [str(cluster) for cluster in clusters]
    one, other = paired_difference(a, b, names, QUICK), paired_difference(b, a, names, QUICK)
    assert one.value == pytest.approx(-other.value)
    if one.clusters > 1:
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
        assert one.low <= one.high


def test_questions_without_a_score_are_left_out():
    found = mean([1.0, math.nan, 3.0], ["a", "b", "c"], QUICK)
    assert (found.value, found.n, found.clusters) == (2.0, 2, 2)
    assert paired_difference([1, 2, math.nan], [0, math.nan, 5], ["a", "b", "c"], QUICK).n == 1
    assert mean([math.nan], ["a"], QUICK) == Estimate(None, None, None, 0, 0, "no question has this score")


def test_one_document_has_no_interval():
    found = mean([1.0, 2.0], ["a", "a"], QUICK)
    assert (found.value, found.low, found.high) == (1.5, None, None)
    assert "one cluster" in found.note
    assert verdict(found) == "can't tell at n = 2"


def test_recovery_of_known_shares():
    clusters = [str(i) for i in range(30)]
    none, full = np.linspace(0, 1, 30), np.linspace(4, 6, 30)
    for share in (-0.5, 0.0, 0.25, 1.0):
        found = recovery(none, none + share * (full - none), full, clusters, QUICK)
        assert (found.value, found.low, found.high) == pytest.approx((share,) * 3, abs=1e-9)


@pytest.mark.parametrize("gain", [0.0, 0.01, -3.0])
def test_recovery_of_next_to_nothing_is_undefined(gain):
    random = np.random.default_rng(0)
    none = random.normal(size=50)
    full = none + gain + random.normal(size=50)
    found = recovery(none, none, full, [str(i) for i in range(50)], QUICK)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 50)
    assert "full − none is" in found.note
    assert "note" in found.to_dict()


def test_recovery_is_undefined_where_a_resample_gains_nothing():
    # full − none is 1 in three of five documents: one resample in a hundred has none of them
    none, full = np.zeros(5), np.array([1.0, 1, 1, 0, 0])
    found = recovery(none, full / 2, full, list("abcde"), Bootstrap(samples=4000))
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "full − none is 0.6 [0.2, 1], and 0 in some resamples" in found.note


def test_columns_at_once_are_columns_one_by_one():
    random = np.random.default_rng(5)
    clusters = [f"d{i // 3}" for i in range(60)]
    values = random.normal(size=(60, 300))
    values[random.random((60, 300)) < 0.02] = math.nan
    values[:58, 7] = math.nan  # one cluster
    values[:, 8] = math.nan  # none
    together = means(values, clusters, QUICK)
    for column in (0, 7, 8, 150, 299):
        alone = mean(values[:, column], clusters, QUICK)
        assert together[column].to_dict() == pytest.approx(alone.to_dict(), abs=1e-12)
    three = np.stack([values, values + 1, values + 2])
    shares = recoveries(*three, clusters, QUICK)
    assert shares[3].value == pytest.approx(recovery(*three[:, :, 3], clusters, QUICK).value) == pytest.approx(0.5)


def test_intervals_are_percentiles_of_resampled_clusters():
    """Against a loop that draws clusters with all their questions."""
    random = np.random.default_rng(7)
    clusters = np.repeat(np.arange(12), random.integers(1, 6, 12))
    values = random.normal(size=len(clusters)) + clusters / 10
    drawn = []
    for _ in range(3000):
        chosen = random.integers(0, 12, 12)
        drawn.append(np.concatenate([values[clusters == cluster] for cluster in chosen]).mean())
    found = mean(values, [str(cluster) for cluster in clusters], Bootstrap(samples=10_000))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.04)


def test_verdicts():
    def words(low, high):
        return verdict(Estimate((low + high) / 2, low, high, 12, 6))

    assert words(0.1, 0.2) == "better"
    assert words(-0.2, -0.1) == "worse"
    assert words(-0.1, 0.2) == words(0.0, 0.2) == "can't tell at n = 12"


def records(**by_condition):
    """20 questions of 10 documents; (nll, f1) per condition, plus what differs by question."""
    return [
        {
            "question_id": f"q{i}",
            "cluster_id": f"d{i // 2}",
            "category": "ab"[i % 2],
            "condition": condition,
            "nll": nll + 0.01 * i,
            "f1": f1 if i != 3 else None,
        }
        for condition, (nll, f1) in by_condition.items()
        for i in range(20)
    ]


def test_effects_are_positive_where_memory_helps():
    scores = Scores(records(none=(5, 0.1), state=(4, 0.3), swapped=(4.5, 0.25), full=(3, 0.5)))
    found = named_effects(scores, ["f1"], QUICK)
    assert found["memory_effect_nll"]["value"] == pytest.approx(0.5)
    assert found["memory_effect_f1"]["value"] == pytest.approx(0.05)
    assert found["memory_effect_f1"]["n"] == 19
    assert found["memory_effect_nll"]["verdict"] == "better"
    assert found["context_recovery_nll"]["value"] == pytest.approx(0.5)
    assert found["context_recovery_f1"]["value"] == pytest.approx(0.5)
    harmed = named_effects(Scores(records(state=(4.5, 0.2), swapped=(4, 0.3))), ["f1"], QUICK)
    assert harmed["memory_effect_nll"]["verdict"] == harmed["memory_effect_f1"]["verdict"] == "worse"
    assert set(harmed) == {"memory_effect_nll", "memory_effect_f1"}
    permuted = named_effects(Scores(records(state=(4, 0.3), permuted=(4.25, 0.3))), ["f1"], QUICK)
    assert set(permuted) == {"layer_effect_nll", "layer_effect_f1"}
    assert permuted["layer_effect_nll"]["value"] == pytest.approx(0.25)


def test_means_keep_the_sign_of_the_nll():
    means = condition_means(Scores(records(none=(5, 0.1))), ["f1"], QUICK)
    assert means["none"]["nll"]["value"] == pytest.approx(5.095)
    assert means["none"]["nll"]["low"] < means["none"]["nll"]["high"]
    assert means["none"]["f1"]["value"] == pytest.approx(0.1)


def test_costs_add_up_by_part():
    costs = [
        {"part": "write", "seconds": 2.0, "tokens": 100, "peak_bytes": 5},
        {"part": "full", "seconds": 1.0, "tokens": 10, "peak_bytes": 9},
        {"part": "full", "seconds": 1.0, "tokens": 30, "peak_bytes": 7},
    ]
    found = total_cost(costs)
    assert (found["seconds"], found["tokens"], found["peak_bytes"]) == (4.0, 140, 9)
    assert found["parts"]["full"] == {"seconds": 2.0, "tokens": 40, "tokens_per_second": 20.0}
