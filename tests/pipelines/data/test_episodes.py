"""Papers become episodes: what is written, where its sections lie, what is learnt, and what doesn't fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.data.documents import Document, Exercise
from pipelines.data.episodes import LONG_DOCUMENT, LONG_QUESTION, NO_TEXT, EpisodeEncoder
from pipelines.data.papers import Answer, Paper, PaperQuestion, Section, paper_document, paper_messages
from pipelines.errors import StageError

# Chat templates that differ in what they put around a message and after an assistant's one.
CHATML_WITH_SYSTEM = (
    "<|im_start|>system\nBe kind.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"


LONG_PAPER, NO_TEXT = LONG_DOCUMENT.format("paper"), NO_TEXT.format("paper")


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def encoder(tokenizer, written=2000, read=500, overlong="drop"):
    return EpisodeEncoder(tokenizer, written, read, overlong)


def make_paper(sections=(("Data", ("We used 12 corpora.", "All of them are old.")),), **fields):
    questions = (PaperQuestion("q0", "How many corpora?", (Answer("12", "extractive"), Answer("twelve", "free_form"))),)
    defaults = {"paper_id": "p", "title": "Title", "abstract": "Abstract.", "questions": questions}
    return Paper(**{**defaults, "sections": tuple(Section(*s) for s in sections), **fields})


def test_messages():
    paper = make_paper([("Data", (" One. ", "", "Two.")), ("Empty", ("", " ")), ("", ("Three.",))])
    contents = [message["content"] for message in paper_messages(paper)]
    assert contents == ["Title\nAbstract.", "Data\nOne.\nTwo.", "Three."]
    assert {message["role"] for message in paper_messages(paper)} == {"user"}
    assert [m["content"] for m in paper_messages(make_paper(title="", abstract=""))][0].startswith("Data")


@pytest.mark.parametrize(
    "template", [None, CHATML_WITH_SYSTEM, TRIMMED, THINKING], ids="chatml system trim think".split()
)
def test_episode(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    row = encoder(tokenizer).encode(paper_document(make_paper())).rows[0]

    for number, message in enumerate(row["messages"]):
        assert tokenizer.decode(row["context_ids"][row["segment_ids"] == number]) == message["content"]
    assert set(row["segment_ids"]) == {-1, 0, 1}
    assert len(row["segment_ids"]) == len(row["context_ids"])

    ask = [{"role": "user", "content": "How many corpora?"}]
    prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["question_ids"]) == prompt
    end = "<|endoftext|>" if template == TRIMMED else "<|im_end|>"
    assert tokenizer.decode(row["answer_ids"]) == "12" + end

    assert (row["answer"], row["answer_type"]) == ("12", "extractive")
    assert row["references"] == ["12", "twelve"]
    assert (row["paper_id"], row["question_id"]) == ("p", "q0")


def test_the_tokens_of_a_value_weigh_more_where_the_source_knows_it(tokenizer):
    ask = [{"role": "user", "content": "Who?"}]
    answered = [("Your dog is Rex.", "Rex"), ("Rex.", ""), ("Who knows?", "Rex")]
    exercises = [Exercise(f"q{n}", ask, [answer], "told", value) for n, (answer, value) in enumerate(answered)]
    document = Document("d", [{"role": "user", "content": "Rex is my dog."}], exercises, "text")
    rows = EpisodeEncoder(tokenizer, 2000, 500, "drop", value_weight=3.0).encode(document).rows
    assert rows[0]["answer_weights"] == [1.0] * 12 + [3.0] * 3 + [1.0] * 2  # bytes, the full stop's and the end's last
    assert [row["answer_weights"] for row in rows[1:]] == [None, None]
    assert all(row["answer_weights"] is None for row in encoder(tokenizer).encode(document).rows)


def test_template_without_an_end_of_turn(tokenizer):
    tokenizer.chat_template = NO_END
    with pytest.raises(StageError, match="its answer has no end to learn.*no end-of-turn token"):
        encoder(tokenizer).encode(paper_document(make_paper()))


def test_paper_at_the_budget_and_one_token_over_it(tokenizer):
    length = len(encoder(tokenizer).encode(paper_document(make_paper())).rows[0]["context_ids"])
    assert len(encoder(tokenizer, written=length).encode(paper_document(make_paper())).rows) == 1
    over = encoder(tokenizer, written=length - 1).encode(paper_document(make_paper()))
    assert (over.rows, over.dropped, over.truncated) == ([], {LONG_PAPER: ["q0"]}, False)


def test_question_at_the_budget_and_one_token_over_it(tokenizer):
    row = encoder(tokenizer).encode(paper_document(make_paper())).rows[0]
    length = len(row["question_ids"]) + len(row["answer_ids"])
    assert len(encoder(tokenizer, read=length).encode(paper_document(make_paper())).rows) == 1
    longer = PaperQuestion("q1", "How many corpora, please?", (Answer("12", "extractive"),))
    both = make_paper(questions=(longer, make_paper().questions[0]))
    result = encoder(tokenizer, read=length).encode(paper_document(both))
    assert [row["question_id"] for row in result.rows] == ["q0"]
    assert result.dropped == {LONG_QUESTION: ["q1"]}


def test_paper_without_text(tokenizer):
    paper = make_paper([("Evidence", ())], title="", abstract=" ")
    assert encoder(tokenizer).encode(paper_document(paper)).dropped == {NO_TEXT: ["q0"]}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_truncation_inside_the_first_section_cuts_at_a_word(tokenizer, count):
    paper = make_paper([("", ("one two three four five",)), ("", ("six",))], title="", abstract="")
    kept = " ".join("one two three four five".split()[:count])
    for spare in (0, 1, 3):
        result = encoder(tokenizer, written=len(rendered([kept])) + spare, overlong="truncate").encode(
            paper_document(paper)
        )
        assert result.truncated
        assert [message["content"] for message in result.rows[0]["messages"]] == [kept]


words = st.lists(st.sampled_from("one two three four é 機械".split()), min_size=1, max_size=30).map(" ".join)


@settings(max_examples=40)
@given(st.lists(words, min_size=1, max_size=5), st.integers(20, 300))
def test_truncation_keeps_the_longest_beginning_that_fits(texts, budget):
    paper = make_paper([("", (text,)) for text in texts], title="", abstract="")
    whole = [message["content"] for message in paper_messages(paper)]
    result = encoder(byte_tokenizer(), written=budget, overlong="truncate").encode(paper_document(paper))
    if not result.rows:
        assert result.dropped == {LONG_PAPER: ["q0"]}
        assert len(rendered(whole[0].split(" ")[:1])) > budget
        return
    kept = [message["content"] for message in result.rows[0]["messages"]]
    assert len(result.rows[0]["context_ids"]) <= budget
    assert result.truncated == (kept != whole)
    if result.truncated and kept == whole[: len(kept)]:
        assert len(rendered(whole[: len(kept) + 1])) > budget
    elif result.truncated:
        count = len(kept[0].split(" "))
        assert len(kept) == 1
        assert kept[0].split(" ") == whole[0].split(" ")[:count]
        assert len(rendered([" ".join(whole[0].split(" ")[: count + 1])])) > budget


def rendered(contents):
    messages = [{"role": "user", "content": content} for content in contents]
    return byte_tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"]


def test_a_template_that_changes_the_texts_is_for_strategies_without_segments(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] | upper if m['role'] == 'user' else m['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    paper = Paper("p", "Title", "Words", (), (PaperQuestion("q", "where?", (Answer("here", "extractive"),)),))
    (row,) = encoder(tokenizer).encode(paper_document(paper)).rows
    assert "TITLE" in tokenizer.decode(row["context_ids"]) and set(row["segment_ids"].tolist()) == {-1}
