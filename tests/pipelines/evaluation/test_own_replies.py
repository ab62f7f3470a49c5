"""The model's own replies as references: what it says alone, and only where it comes to an end."""

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

    run.says = says
    return run


def test_references_are_greedy_replies_that_end_and_other_questions_keep_theirs(own):
    texts = [f"What is {word}?" for word in ("tea", "a boat", "the moon", "gravity", "a verb", "rain")]
    everything = list(range(0, 256, 3))
    finished = {}
    for text in texts:
        tokens, tokenizer = own.says(text, everything)
        reply = tokenizer.decode(tokens[:-1], skip_special_tokens=True).strip()
        if tokens[-1] in everything and len(tokens) <= LIMIT and reply:
            finished[text] = reply
    assert finished, "some replies must end for this test to tell anything"
    contexts = [context(0, *texts), context(1, texts[0]), context(2, "kept", references=["as it is"])]
    found = {q.question_id: q.references for c in own(contexts, everything) for q in c.questions}
    expected = {f"0/{text}": [reply] for text, reply in finished.items()} | {"2/kept": ["as it is"]}
    expected |= {f"1/{texts[0]}": [finished[texts[0]]]} if texts[0] in finished else {}
    assert found == expected


def test_replies_without_an_end_are_nothing_to_compare_with(own):
    with pytest.raises(StageError, match="none of its replies to 2 questions within 12 tokens.*max_new_tokens"):
        own([context(0, "a", "b")], [10_000])
