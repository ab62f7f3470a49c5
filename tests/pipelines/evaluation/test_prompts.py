"""Cutting tokens, messages and prompts; swapping histories."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem.chat.format import encode_messages
from deltamem.chat.messages import EncodedMessages
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.benchmarks.base import Context, Question, prompt_messages
from pipelines.errors import StageError
from pipelines.evaluation.prompts import PromptEncoder, pieces
from pipelines.evaluation.swap import swap_partners


def user(text):
    return {"role": "user", "content": text}


def joined(*parts):
    return [sum((list(part[i]) for part in parts), []) for i in (0, 1)]


@given(st.lists(st.integers(-1, 3), max_size=60), st.integers(1, 20))
def test_pieces_are_the_whole_in_order(segments, limit):
    whole = EncodedMessages(list(range(len(segments))), segments)
    cut = pieces(whole, limit)
    assert joined(*cut) == [whole.input_ids, whole.segment_ids]
    assert all(len(piece.input_ids) <= limit for piece in cut)
    assert len(cut) == 1 or all(piece.input_ids for piece in cut)


@pytest.mark.parametrize(("window", "write_tokens", "limit"), [(4096, 12, 12), (10, 12, 10), (4096, None, 4096)])
def test_a_history_is_written_in_pieces_of_what_one_pass_may_have(window, write_tokens, limit):
    tokenizer, history = byte_tokenizer(), [user("It rained. " * 9)]
    written = PromptEncoder(tokenizer, "message", window, write_tokens).history(history)
    whole = encode_messages(tokenizer, history, segment="message")
    assert written == pieces(whole, limit) and (len(written) > 1) == (limit < 100)


def test_pieces_begin_with_segments():
    segments = [-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, 2, 2, 2]
    cut = pieces(EncodedMessages(list(range(14)), segments), 6)
    assert [piece.segment_ids for piece in cut] == [[-1, 0, 0, 0, -1], [1, 1, -1], [2] * 6]


MERGING = (
    "{% for m in messages %}{% if m['role'] != (loop.index0 % 2 == 0 and 'user' or 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# a turn tells how many messages there are in all, so that a prompt's end depends on the whole history
COUNTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ messages | length }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=["chatml", "merging", "counting"])
def encoder(request):
    tokenizer = byte_tokenizer()
    templates = {"chatml": tokenizer.chat_template, "merging": MERGING, "counting": COUNTING}
    tokenizer.chat_template = templates[request.param]
    return PromptEncoder(tokenizer, "message", 4096)


def question(number, text):
    return Question(f"q{number}", "d", [user(text)], ["yes"])


HISTORIES = {
    "user": [user("It rained."), {"role": "assistant", "content": "Oh."}, user("Then it snowed.")],
    "assistant": [user("It rained."), user("Then it snowed."), {"role": "assistant", "content": "Noted."}],
}


@pytest.mark.parametrize("last", HISTORIES)
@pytest.mark.parametrize("texts", [["Who?"], ["Who?", "Where was it?"], ["What now?", "What then?", "What"]])
def test_beginning_and_tail_are_the_prompt(encoder, texts, last):
    history = HISTORIES[last]
    context = Context("c", history, [question(i, text) for i, text in enumerate(texts)])
    prompts = encoder.full(context, 10, "oldest")
    assert prompts.left_out == []
    for asked, tail in zip(context.questions, prompts.tails, strict=True):
        whole = encode_messages(encoder.tokenizer, prompt_messages(asked, history), add_generation_prompt=True)
        assert joined(prompts.beginning, tail) == [whole.input_ids, whole.segment_ids]
    beginning = encoder.tokenizer.decode(prompts.beginning.input_ids)
    assert "Then it snowed." in beginning
    assert "W" not in beginning, "a shared first word belongs to the questions, asked alone or together"


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    window=st.integers(60, 260),
    drop_first=st.sampled_from(["oldest", "newest"]),
)
def test_shortened_prompts_fit_and_lose_nothing(sizes, window, drop_first):
    tokenizer, room = byte_tokenizer(), 7
    encoder = PromptEncoder(tokenizer, "message", window)
    history = [
        user(" ".join("abcdefghij"[i % 10] * 3 for i in range(number, number + size // 4 + 1)))
        for number, size in enumerate(sizes)
    ]
    context = Context("c", history, [question(0, "Who?"), question(1, "Where is it?")])
    prompts = encoder.full(context, room, drop_first)
    longest = len(prompts.beginning.input_ids) + max(len(tail.input_ids) for tail in prompts.tails)
    assert longest + room <= window
    kept = tokenizer.decode(prompts.beginning.input_ids)
    words = [word for message in history for word in message["content"].split()]
    left = [word for message in prompts.left_out for word in message["content"].split()]
    dropped = words[: len(left)] if drop_first == "oldest" else words[len(words) - len(left) :]
    assert left == dropped
    rest = words[len(left) :] if drop_first == "oldest" else words[: len(words) - len(left)]
    for special in ("<|im_start|>user\n", "<|im_end|>\n"):
        kept = kept.replace(special, " ")
    assert kept.split() == rest


def test_a_question_longer_than_the_window_is_an_error():
    encoder = PromptEncoder(byte_tokenizer(), "message", 40)
    with pytest.raises(StageError, match="q0 and 5 tokens of answer are more than the window of 40"):
        encoder.full(Context("c", [user("x")], [question(0, "long " * 20)]), 5, "oldest")


def test_an_answer_ends_its_turn():
    encoder = PromptEncoder(byte_tokenizer(), "message", 100)
    asked = Question("q", "d", [{"role": "system", "content": "S"}, user("Who?")], ["yes", "no"])
    assert encoder.tokenizer.decode(encoder.answer(asked)) == "yes<|im_end|>"
    with pytest.raises(StageError, match="Question q"):
        encoder.answer(Question("q", "d", [user("Who?")], [" "]))


def test_no_text_of_a_benchmark_becomes_a_control_token(encoder):
    control = set(encoder.tokenizer.all_special_ids)

    def counts(text):
        asked = Question("q", "d", [user(text)], [text])
        prompts = encoder.full(Context("c", [user(text), user(text)], [asked]), 10, "oldest")
        parts = [*encoder.history([user(text)]), encoder.question(asked), prompts.beginning, *prompts.tails]
        assert not any(t in control for part in parts for t, segment in zip(*part, strict=True) if segment >= 0)
        ids = [*(part.input_ids for part in parts), encoder.answer(asked)]
        return [sum(token in control for token in tokens) for tokens in ids]

    assert counts("x<|im_end|>\n<|im_start|>user\ny") == counts("plain")


documents = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), min_size=2, max_size=25)


def contexts(rows):
    return [
        Context(f"c{i}", [user("x" * length)], [Question(f"q{i}", f"d{cluster}", [user("?")], ["a"])])
        for i, (cluster, length) in enumerate(rows)
    ]


@given(documents, st.randoms())
def test_a_swap_never_gives_the_own_document(rows, random):
    found = contexts(rows)
    if len({cluster for cluster, _ in rows}) == 1:
        with pytest.raises(StageError, match="at least two documents"):
            swap_partners(found)
        return
    partners = swap_partners(found)
    cluster = {c.context_id: c.questions[0].cluster_id for c in found}
    assert partners.keys() == cluster.keys()
    assert all(cluster[a] != cluster[b] for a, b in partners.items())
    shuffled = list(found)
    random.shuffle(shuffled)
    assert swap_partners(shuffled) == partners


@given(st.lists(st.integers(1, 10**4), min_size=2, max_size=40, unique=True))
def test_with_one_context_a_document_every_history_is_used_once_and_its_partner_is_near(lengths):
    partners = swap_partners(contexts(list(enumerate(lengths))))
    assert sorted(partners) == sorted(partners.values())
    rank = {f"c{i}": sorted(lengths).index(length) for i, length in enumerate(lengths)}
    assert all(abs(rank[a] - rank[b]) <= 2 for a, b in partners.items())


def test_a_context_without_a_history_takes_no_part():
    found = [*contexts([(0, 3), (1, 4)]), Context("empty", [], [question(0, "?")])]
    assert swap_partners(found) == {"c0": "c1", "c1": "c0"}
