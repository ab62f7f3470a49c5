"""Long prompts fed in parts: the same logits, cache and memory as in one pass."""

import pytest
import torch

from deltamem import ChatSession, DeltaMemError
from deltamem.chat.prompt_parts import cut
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.turn import Turn, TurnOptions
from tests.tiny_models import make_chat_model

LONG = [{"role": "user", "content": "a message of some length, " * 4}]


def count_passes(model):
    """A list that grows by the length of every pass."""
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


def feed(model, tokenizer, part_tokens, **options):
    runtime = ChatRuntime(model, tokenizer, part_tokens=part_tokens)
    turn = Turn(runtime, runtime.new_state(), LONG, TurnOptions(**options))
    with torch.no_grad():
        return turn, turn.prefill()


def same(a, b):
    (one, logits), (other, other_logits) = a, b
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits, other_logits, **close)
    torch.testing.assert_close(dict(one.memory.states), dict(other.memory.states), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(one.keys.layers, other.keys.layers, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    assert one.tokens == other.tokens and one.prompt_length == other.prompt_length == len(one.tokens)


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("part_tokens", [1, 17])
def test_parts_make_what_one_pass_makes(strategy, family, part_tokens):
    sliding = {"sliding_window": 16} if family == "gemma3_text" else {}
    model, tokenizer = make_chat_model(strategy, family, base=sliding)
    whole = feed(model, tokenizer, 4096)
    passes = count_passes(model)
    same(feed(model, tokenizer, part_tokens), whole)
    assert sum(passes) == len(whole[0].tokens) and set(passes[:-1]) == {part_tokens}


def test_messages_written_as_segments_stay_whole_and_those_only_read_are_cut():
    model, tokenizer = make_chat_model("ssw")
    read_whole = feed(model, tokenizer, 4096, write=False)
    passes = count_passes(model)
    written, _ = feed(model, tokenizer, 10)
    assert passes == [len(written.tokens)]
    passes.clear()
    same(feed(model, tokenizer, 10, write=False), read_whole)
    assert len(passes) > 10 and max(passes) == 10


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_no_pass_of_a_chat_is_long_even_when_old_turns_are_read_again(strategy):
    """The window moves twice; what is read again is cut under every strategy."""
    model, tokenizer = make_chat_model(strategy)
    whole, parts = (ChatSession(model, tokenizer, window=400) for _ in range(2))
    parts.runtime.part_tokens = 20
    for number in range(9):
        expected = whole.send(f"message number {number}", max_new_tokens=20)
        passes = count_passes(model)
        reply = parts.send(f"message number {number}", max_new_tokens=20)
        assert reply == expected and (strategy == "ssw" or max(passes) <= 20)
    assert parts.forgotten == whole.forgotten > 2
    torch.testing.assert_close(dict(parts.memory.states), dict(whole.memory.states), rtol=1e-4, atol=1e-5)


def test_a_turn_dropped_between_two_parts_leaves_no_trace():
    chat = ChatSession(*make_chat_model())
    chat.send("one", max_new_tokens=4)
    chat.runtime.part_tokens = 10
    twin, before = chat.fork(), chat.state
    turn = Turn(chat.runtime, chat.state, LONG, TurnOptions())
    with torch.no_grad():
        assert turn.feed_prompt() is None and turn.feed_prompt() is None
    assert chat.state is before
    assert chat.send("two", max_new_tokens=4) == twin.send("two", max_new_tokens=4)
    assert all(torch.equal(chat.memory.states[i], twin.memory.states[i]) for i in chat.memory.states)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 30])
def test_cutting_loses_nothing(count):
    ids = list(range(count))
    parts = cut(ids, None, True, by_segment=False, most_tokens=10)
    assert [token for part in parts for token in part.ids] == ids
    assert all(0 < len(part.ids) <= 10 for part in parts)


def test_a_part_of_nothing_is_refused():
    with pytest.raises(DeltaMemError, match="part_tokens must be at least 1"):
        ChatRuntime(*make_chat_model(), part_tokens=0)
