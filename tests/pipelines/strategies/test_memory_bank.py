"""MemoryBank: what it leaves of a history."""

from pipelines.benchmarks import Context, Question
from pipelines.config.strategies import MemoryBankStrategy
from pipelines.strategies.memory_bank import MemoryBank
from tests.stories import STORY, context, texts


def memory_bank(**changes):
    asked = []

    def summarise(contents, limit):
        asked.append((list(contents), limit))
        return [f"summary {number}" for number in range(len(contents))]

    options = {"kind": "memory_bank", "top_k": 1, "passage_characters": 1000, "lifetime": 1.0, **changes}
    return MemoryBank(MemoryBankStrategy(**options), summarise, "cpu"), asked


def test_memory_bank_puts_summaries_of_all_sessions_first():
    bank, asked = memory_bank(summary_tokens=30)
    (made,) = bank(context("Which car?"))
    assert texts(made)[0] == "Summary of what happened, in order:\n1. summary 0\n2. summary 1\n3. summary 2"
    assert texts(made)[1:] == [STORY[1]]
    assert asked == [(STORY, 30)]
    bank, asked = memory_bank(summary_tokens=0)
    (made,) = bank(context("Which car?"))
    assert texts(made) == [STORY[1]] and asked == []


def test_what_is_old_fades_and_what_is_recalled_stays():
    story = [{"role": "user", "content": text} for text in ("the cat sat", "nothing here", "the cat ran")]
    made = [
        Question(f"q{n}", "d", [{"role": "user", "content": t}], ["x"]) for n, t in enumerate(["cat", "sat", "cat"])
    ]
    bank, _ = memory_bank(summary_tokens=0)
    found = [texts(one)[0] for one in bank(Context("c", story, made))]
    # equally relevant, the newer one wins; the older one alone has "sat"; then both were recalled once
    assert found == ["the cat ran", "the cat sat", "the cat sat"]
