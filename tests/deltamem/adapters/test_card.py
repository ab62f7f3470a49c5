"""Model cards, with what evaluations found."""

import re

import pytest

from deltamem.adapters.card import evaluation_table, model_card
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError


def estimate(value, width=0.1, **more):
    return {"value": value, "low": value - width, "high": value + width, "n": 40, "clusters": 10, **more}


UNDEFINED = {"value": None, "low": None, "high": None, "n": 39, "clusters": 10, "note": "full − none is 0 | unclear"}
RESULT = {
    "benchmark": "qasper",
    "conditions": {
        "none": {"nll": estimate(5.0), "f1": estimate(0.1)},
        "state": {"nll": estimate(4.0), "f1": estimate(0.3)},
        "swapped": {"nll": estimate(4.5), "f1": estimate(0.3)},
        "full": {"nll": estimate(3.0), "f1": {**UNDEFINED, "note": "no question has this score"}},
    },
    "effects": {
        "memory_effect_nll": estimate(0.5, verdict="better"),
        "memory_effect_f1": estimate(-0.0001, 0.0003, verdict="can't tell at n = 40"),
        "context_recovery_nll": estimate(0.5),
        "context_recovery_f1": UNDEFINED,
    },
}


def test_a_table_has_every_condition_and_effect_with_its_interval():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in evaluation_table(RESULT).splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["condition", "NLL (nats per token, lower is better)", "F1"]
    assert rows[2:] == [
        ["none", "5.000 [4.900, 5.100]", "0.100 [0.000, 0.200]"],
        ["state", "4.000 [3.900, 4.100]", "0.300 [0.200, 0.400]"],
        ["swapped", "4.500 [4.400, 4.600]", "0.300 [0.200, 0.400]"],
        ["full", "3.000 [2.900, 3.100]", "undefined: no question has this score"],
        [
            "**memory effect (state − swapped, positive is better)**",
            "0.500 [0.400, 0.600] better",
            "0.000 [0.000, 0.000] can't tell at n = 40",
        ],
        [
            "**context recovery ((state − none) / (full − none))**",
            "0.500 [0.400, 0.600]",
            "undefined: full − none is 0 / unclear",
        ],
    ]
    assert "40 questions in 10 documents" in evaluation_table(RESULT)


def test_a_model_without_memory_has_a_table_without_effects():
    kept = {name: RESULT["conditions"][name] for name in ("none", "full")}
    table = evaluation_table({**RESULT, "conditions": kept, "effects": {}})
    assert "memory effect" not in table and "| full |" in table


def test_a_card_with_evaluations_says_what_the_conditions_are():
    plain = model_card(DeltaMemConfig(), 1234)
    card = model_card(DeltaMemConfig(), 1234, [RESULT, {**RESULT, "benchmark": "locomo"}])
    assert card.startswith(plain) and "1,234 parameters" in plain
    assert re.findall(r"^### (.*)$", card, re.M) == ["qasper", "locomo"]
    assert "What `state`\nhas over `swapped` is memory" in card and "What it remembers" not in plain


@pytest.mark.parametrize("other", [{}, {"conditions": {}, "effects": {}}, {"conditions": [], "effects": {}}, []])
def test_what_is_no_result_is_refused(other):
    with pytest.raises(AdapterFormatError, match=r"not an evaluation's result.*pipelines\.evaluate"):
        evaluation_table(other)
