"""The model's own replies as references: what it says alone, to the end or as far as it comes."""

from dataclasses import replace

import pytest
import torch

from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.benchmarks.base import Context, Question
from pipelines.errors import StageError
from pipelines.evaluation.own_replies import with_own_replies
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder

LIMIT = 12


def context(number, *asked, references=()):
    questions = [
        Question(f"{number}/{text}", str(number), [{"role": "user", "content": text}], list(references))
        for text in asked
    ]
    return Context(str(number), [{"role": "user", "content": "I like tea."}], questions)


@pytest.fixture
def own(tiny_model):
    """Contexts with the replies of a tiny model for which any of ``ends`` ends a reply, and what it would say."""
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen3", tokenizer=tokenizer)
    encoder = PromptEncoder(tokenizer, "message", 4096)

    def run(contexts, ends):
        return with_own_replies(contexts, Reader(model, ends, tokenizer.pad_token_id), encoder, LIMIT, batch_size=2)

    def says(text, ends):
        ids = torch.tensor([encoder.question(Question("", "", [{"role": "user", "content": text}], [])).input_ids])
        made = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, eos_token_id=ends, pad_token_id=0)
        return made[0, ids.shape[1] :].tolist(), tokenizer

    run.says, run.encoder = says, encoder
    return run


def test_references_are_greedy_replies_as_far_as_they_come_and_other_questions_keep_theirs(own):
    texts = [f"What is {word}?" for word in ("tea", "a boat", "the moon", "gravity", "a verb", "rain")]
    ends = list(range(0, 256, 20))
    expected = {}
    for text in texts:
        tokens, tokenizer = own.says(text, ends)
        ended = tokens[-1] in ends
        said = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).strip()
        if said:
            category = "whole replies" if ended else "beginnings of longer ones"
            expected[text] = ([said], category, ended)
    assert {finished for _, _, finished in expected.values()} == {True, False}, "else this tells nothing"
    contexts = [context(0, *texts), context(1, texts[0]), context(2, "kept", references=["as it is"])]
    answered = [question for c in own(contexts, ends) for question in c.questions]
    found = {q.question_id: (q.references, q.category, q.finished) for q in answered}
    of_all = {f"0/{text}": reply for text, reply in expected.items()} | {"2/kept": (["as it is"], "", True)}
    assert found == of_all | ({f"1/{texts[0]}": expected[texts[0]]} if texts[0] in expected else {})
    for question in answered:
        whole = own.encoder.answer(replace(question, finished=True))
        assert own.encoder.answer(question) == (whole if question.finished else whole[:-1])


def test_where_nothing_is_said_there_is_nothing_to_compare_with(own):
    with pytest.raises(StageError, match="says nothing to any of 2 questions"):
        own([context(0, "a", "b")], list(range(10_000)))
