"""ChatSession: what is fed, written, kept, taken back and forgotten."""

import pytest
import torch

from deltamem import ChatSession, DeltaMemError, encode_messages
from deltamem.chat.batch import Batch
from deltamem.chat.turn import Turn, TurnOptions, choose
from deltamem.errors import WindowError
from tests.tiny_models import make_chat_model

STRATEGIES = ["tsw", "ssw", "msw"]
SHORT = {"max_new_tokens": 8}


def same_memory(a, b, exact=False):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(dict(a.states), dict(b.states), **tolerance)


def next_logits(session, text="and now?"):
    turn = Turn(session.runtime, session.state, [{"role": "user", "content": text}], TurnOptions())
    with torch.no_grad():
        return turn.prefill()


@pytest.fixture(params=STRATEGIES)
def chat(request):
    model, tokenizer = make_chat_model(request.param)
    return ChatSession(model, tokenizer)


def test_a_turn_feeds_only_its_new_tokens_and_forms_the_templates_own_text(chat):
    fed = []
    chat.runtime.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    chat.send("one", **SHORT)
    before = chat.state.keys.length
    fed.clear()
    reply = chat.send("two", **SHORT)
    assert reply.cached_tokens == before
    assert fed[0] == reply.prompt_tokens - before < 60
    text = chat.runtime.tokenizer.decode(chat.state.tokens)
    whole = chat.runtime.tokenizer.apply_chat_template(chat.messages, tokenize=False)
    assert whole == text + "<|im_end|>\n"
    assert len(chat.state.tokens) == chat.state.keys.length


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_token_writes_equal_one_pass_over_the_whole_chat(strategy, family):
    # gemma's layers see few tokens back, and its cache must still be whole
    base = {"sliding_window": 16} if family == "gemma3_text" else {}
    model, tokenizer = make_chat_model(strategy, family, base=base)
    chat = ChatSession(model, tokenizer)
    for text in ("first words", "second words", "third"):
        chat.send(text, **SHORT)
    with torch.no_grad():
        out = model(torch.tensor([chat.state.tokens]), use_cache=True)
    same_memory(chat.memory, out.memory)
    for (keys, _), layer in zip(chat.state.keys.layers, out.past_key_values.layers, strict=True):
        assert keys.shape[2] == len(chat.state.tokens)
        torch.testing.assert_close(keys[:, :, -layer.keys.shape[2] :], layer.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segment", ["message", "sentence"])
def test_segment_writes_are_one_pass_per_message(segment):
    model, tokenizer = make_chat_model("ssw", segment=segment)
    chat = ChatSession(model, tokenizer)
    chat.send("One thing. Another thing.", **SHORT)
    reply_length = chat.last_reply.reply_tokens
    prompt = encode_messages(tokenizer, chat.messages[:1], True, segment)
    assert len(prompt.input_ids) + reply_length == chat.state.keys.length
    with torch.no_grad():
        first = model(torch.tensor([prompt.input_ids]), segment_ids=torch.tensor([prompt.segment_ids]), use_cache=True)
        reply = torch.tensor([chat.state.tokens[-reply_length:]])
        text, segments = "", []
        for token in reply[0]:
            ended = [end for end in range(1, len(text) + 1) if text[end - 1] in " \n" and text[end - 2] in ".!?"]
            segments.append(len(ended) if segment == "sentence" else 0)
            text += tokenizer.decode([token])
        second = model(
            reply,
            memory=first.memory,
            segment_ids=torch.tensor([segments]),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    same_memory(chat.memory, second.memory)


def test_without_a_chat_template_no_chat_begins():
    model, tokenizer = make_chat_model()
    tokenizer.chat_template = None
    with pytest.raises(DeltaMemError, match="no chat template, so there is no chatting"):
        ChatSession(model, tokenizer)


def test_sentences_of_a_reply_are_segments_of_their_own():
    model, tokenizer = make_chat_model("ssw", segment="sentence")
    chat = ChatSession(model, tokenizer)
    turn = Turn(chat.runtime, chat.state, [{"role": "user", "content": "hi"}], TurnOptions())
    with torch.no_grad():
        turn.prefill()
        for token in tokenizer("Yes. No way! Ok", add_special_tokens=False).input_ids:
            turn.accept(token)
    assert turn._reply_segments() == [0] * 5 + [1] * 8 + [2] * 2


def test_without_writing_the_memory_stays_and_is_still_read(chat):
    chat.send("remember this", **SHORT)
    before = chat.memory
    chat.write = False
    chat.send("do not write that", **SHORT)
    same_memory(chat.memory, before, exact=True)
    assert len(chat.messages) == 4
    with_memory, without = chat.compare("what was it?", max_new_tokens=20)
    assert with_memory.text != without.text, "the memory should steer"
    assert len(chat.messages) == 4


def test_without_memory_is_the_frozen_backbone(chat):
    chat.send("remember this", **SHORT)
    _, without = chat.compare("what was it?", max_new_tokens=12)
    tokenizer = chat.runtime.tokenizer
    messages = [*chat.messages, {"role": "user", "content": "what was it?"}]
    ids = torch.tensor([encode_messages(tokenizer, messages, True).input_ids])
    out = chat.runtime.model.base_model.generate(ids, max_new_tokens=12, do_sample=False)
    assert without.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_strength_of_a_turn_is_its_own(chat):
    chat.send("remember this", **SHORT)
    chat.clear_prompt()
    _, frozen = chat.compare("what was it?", max_new_tokens=12)
    weak, strong = chat.fork(), chat.fork()
    assert weak.send("what was it?", max_new_tokens=12, strength=0).text == frozen.text
    chat.send("what was it?", max_new_tokens=12)
    assert chat.last_reply.text != frozen.text
    chat.runtime.model.strength = 0.0  # what a turn says goes before what the model says
    assert strong.send("what was it?", max_new_tokens=12, strength=1).text == chat.last_reply.text


def test_undo_takes_back_exactly_one_turn(chat):
    chat.send("one", **SHORT)
    before, logits = chat.state, next_logits(chat)
    chat.send("two", **SHORT)
    chat.undo()
    assert (chat.messages, chat.state.tokens) == (list(before.messages), before.tokens)
    same_memory(chat.memory, before.memory, exact=True)
    assert torch.equal(next_logits(chat), logits)
    with pytest.raises(DeltaMemError, match="no turn to take back"):
        chat.undo()


def test_reset_forgets_everything_and_can_be_undone(chat):
    chat.send("one", **SHORT)
    memory = chat.memory
    chat.reset()
    assert chat.messages == [] and not any(state.any() for state in chat.memory.states.values())
    chat.undo()
    same_memory(chat.memory, memory, exact=True)


def test_forks_are_independent(chat):
    chat.send("one", **SHORT)
    twin = chat.fork()
    kept = twin.state
    chat.send("two", **SHORT)
    assert twin.state is kept and len(twin.messages) == 2
    twin.send("two", **SHORT)
    assert twin.messages == chat.messages
    same_memory(twin.memory, chat.memory, exact=True)
    twin.send("three", **SHORT)
    assert len(chat.messages) == 4


def test_a_stream_closed_early_leaves_no_trace(chat):
    chat.send("one", **SHORT)
    state = chat.state
    stream = chat.stream("two", **SHORT)
    next(stream)
    stream.close()
    assert chat.state is state


def test_pieces_of_the_stream_make_the_reply(chat):
    pieces = list(chat.stream("tell me", max_new_tokens=30))
    assert "".join(pieces) == chat.last_reply.text == chat.messages[-1]["content"]
    assert chat.last_reply.finish_reason == "length"


def test_between_pieces_gradients_are_as_the_caller_has_them(chat):
    stream = chat.stream("tell me", max_new_tokens=30)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()


def test_a_system_message_begins_the_chat_and_survives_a_reset():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer, system="Be brief.")
    for _ in range(2):
        chat.send("hello", **SHORT)
        assert chat.messages[0] == {"role": "system", "content": "Be brief."}
        chat.reset()


@pytest.mark.parametrize("stop, text", [("END", "one tw"), ("e", "on"), ("ü", "one twEND s"), ("zz", None)])
def test_a_stop_sequence_ends_the_reply_and_leaves_what_follows_out(chat, stop, text):
    words = "one twEND süß"
    tokenizer, batch, pieces = chat.runtime.tokenizer, Batch(), []
    question = [{"role": "user", "content": "hi"}]
    turn = Turn(chat.runtime, chat.state, question, TurnOptions(stop=(stop, "zzz"), max_new_tokens=50))
    with torch.no_grad():
        turn.prefill()
        for token in [*tokenizer(words, add_special_tokens=False).input_ids, tokenizer.eos_token_id]:
            pieces.append(turn.accept(token))
            if turn.finish_reason:
                break
            batch.step([turn])
        batch.release()
        state = turn.finish()
        expected = words if text is None else text
        assert "".join(pieces) == turn.summary().text == state.messages[-1]["content"] == expected
        assert turn.finish_reason == "stop"
        assert tokenizer.decode(state.tokens).endswith(f"assistant\n{expected}")
        if chat.runtime.model.config.strategy != "ssw":
            same_memory(state.memory, chat.runtime.model(torch.tensor([state.tokens])).memory)


def test_drawing_is_seeded_and_follows_top_p_and_top_k():
    model, tokenizer = make_chat_model()
    drawn = [
        ChatSession(model, tokenizer).send("hi", max_new_tokens=20, temperature=3.0, seed=seed).text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = ChatSession(model, tokenizer).send("hi", max_new_tokens=20).text
    nearly_greedy = {"temperature": 3.0, "top_p": 1e-6, "seed": 3}
    assert ChatSession(model, tokenizer).send("hi", max_new_tokens=20, **nearly_greedy).text == greedy
    one = {"temperature": 3.0, "top_k": 1, "seed": 3}
    assert ChatSession(model, tokenizer).send("hi", max_new_tokens=20, **one).text == greedy


BAD_OPTIONS = [
    {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"max_new_tokens": "3"}, {"temperature": -1}, {"temperature": "1"},
    {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"top_k": 1.5}, {"seed": "x"},
    {"seed": 2**70}, {"stop": "abc"}, {"stop": ("",)},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_options_outside_their_domain_are_refused(bad):
    with pytest.raises(DeltaMemError, match=next(iter(bad))):
        TurnOptions(**bad)


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("half a \ud800 character", "isn't text that UTF-8 can hold"),
        (["words"], "message 0 is not a"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "message 1 is not a"),
        ([{"role": "user", "content": None}], "message 0 is not a"),
        ([], "no message to answer"),
    ],
)
def test_what_is_not_a_message_is_refused_and_changes_nothing(bad, reason):
    chat = ChatSession(*make_chat_model())
    with pytest.raises(DeltaMemError, match=reason):
        chat.send(bad)
    assert chat.messages == []


def test_a_whole_number_is_a_temperature_too():
    model, tokenizer = make_chat_model()
    texts = [ChatSession(model, tokenizer).send("hi", temperature=t, seed=4, **SHORT).text for t in (1, 1.0)]
    assert texts[0] == texts[1]


# --- the window
# -------------------------------------------------------------------------------------------------


def test_old_turns_leave_the_prompt_and_stay_in_the_memory():
    for strategy in STRATEGIES:
        model, tokenizer = make_chat_model(strategy)
        chat = ChatSession(model, tokenizer, system="S", window=300)
        forgotten = 0
        for number in range(8):
            before = chat.memory
            reply = chat.send(f"message number {number}", **SHORT)
            forgotten += reply.newly_forgotten
            assert chat.state.keys.length <= 300
            assert chat.forgotten == forgotten
            text = tokenizer.decode(chat.state.tokens)
            assert text.startswith("<|im_start|>system\nS<|im_end|>")
            for index, message in enumerate(chat.messages[1::2]):
                assert (message["content"] + "<|im_end|>" in text) == (2 * index >= forgotten)
            assert any((chat.memory.states[i] != before.states[i]).any() for i in before.states)
        assert forgotten > 0 and forgotten % 2 == 0


def test_the_turns_that_stay_are_read_again_but_not_written_again():
    model, tokenizer = make_chat_model("tsw")
    chat = ChatSession(model, tokenizer, window=300)
    while True:
        before = chat.state
        if chat.send("message", **SHORT).newly_forgotten:
            break
    assert chat.last_reply.cached_tokens == 0
    visible = chat.state.visible
    ids = torch.tensor([chat.state.tokens])
    old = len(encode_messages(tokenizer, visible[:-2], False).input_ids) - len(
        tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids
    )
    with torch.no_grad():
        reread = model(ids[:, :old], memory=before.memory, write=False, use_cache=True)
        rest = model(ids[:, old:], memory=before.memory, past_key_values=reread.past_key_values, use_cache=True)
    same_memory(chat.memory, rest.memory)


def test_undo_reaches_back_over_a_moved_window():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer, window=300)
    while True:
        logits, messages = next_logits(chat), chat.messages
        if chat.send("message", **SHORT).newly_forgotten:
            break
    chat.undo()
    assert chat.messages == messages and chat.forgotten == 0
    assert torch.equal(next_logits(chat), logits)


def test_a_message_longer_than_the_window_is_refused_and_changes_nothing():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer, window=100)
    with pytest.raises(WindowError, match="window holds 100"):
        chat.send("x" * 200)
    assert chat.messages == []
    reply = chat.send("x" * 40, max_new_tokens=500)
    assert reply.finish_reason == "length" and chat.state.keys.length == 100
    chat.send("short")
    with pytest.raises(WindowError, match="allows 2 to 4096"):
        ChatSession(model, tokenizer, window=5000)


def test_the_frozen_answer_leaves_out_what_does_not_fit():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer, window=200)
    chat.send("x" * 30, max_new_tokens=60)
    _, without = chat.compare("y" * 30, max_new_tokens=60)
    assert without.prompt_tokens == len(encode_messages(tokenizer, [{"role": "user", "content": "y" * 30}], True)[0])


def test_after_a_cleared_prompt_a_chat_begins_as_at_first():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer, system="Be brief.")
    chat.send("my secret", **SHORT)
    chat.clear_prompt()
    reply = chat.send("what is it?", **SHORT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is it?"}]
    assert list(chat.state.tokens[: reply.prompt_tokens]) == encode_messages(tokenizer, messages, True).input_ids


def test_a_cleared_prompt_leaves_the_memory_alone(chat):
    chat.send("my secret", **SHORT)
    memory = chat.memory
    chat.clear_prompt()
    same_memory(chat.memory, memory, exact=True)
    assert chat.forgotten == 2
    reply = chat.send("what is it?", **SHORT)
    assert "secret" not in chat.runtime.tokenizer.decode(chat.state.tokens)
    assert reply.cached_tokens == 0


# --- together
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_turns_decoded_together_are_what_they_are_alone(strategy, family):
    sliding = {"sliding_window": 16} if family == "gemma3_text" else {}
    model, tokenizer = make_chat_model(strategy, family, base=sliding)
    options = [TurnOptions(max_new_tokens=n, write=write) for n, write in ((6, True), (12, False), (9, True))]
    histories = ["a", "a longer history of words", "mid"]
    chats = []
    for text in histories:
        chat = ChatSession(model, tokenizer)
        chat.send(text, **SHORT)
        chats.append(chat)
    question = [{"role": "user", "content": "so?"}]
    alone = []
    for chat, option in zip(chats, options, strict=True):
        twin = chat.fork()
        twin.write = option.write
        twin.send("so?", max_new_tokens=option.max_new_tokens)
        alone.append(twin)
    turns = [Turn(c.runtime, c.state, question, o) for c, o in zip(chats, options, strict=True)]
    batch, active = Batch(), []
    with torch.no_grad():
        for turn in turns:  # they join one by one, and leave as they finish
            turn.accept(choose([turn], turn.prefill())[0])
            active.append(turn)
            logits = batch.step(active)
            for member, token in zip(active, choose(active, logits), strict=True):
                member.accept(token)
        while active := [turn for turn in active if not turn.finish_reason]:
            for member, token in zip(active, choose(active, batch.step(active)), strict=True):
                member.accept(token)
        batch.release()
        states = [turn.finish() for turn in turns]
    for state, twin in zip(states, alone, strict=True):
        assert state.tokens == twin.state.tokens and state.messages == twin.state.messages
        same_memory(state.memory, twin.memory)
        for ours, theirs in zip(state.keys.layers, twin.state.keys.layers, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
