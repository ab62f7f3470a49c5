"""A row that has ended stays as it was, whatever ended it and whatever the other rows do."""

import pytest
import torch
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StoppingCriteria

from tests.tiny_models import make_chat_model

PROMPTS = torch.tensor([[65, 69, 80, 97], [101, 83, 88, 100]])
LENGTH = 10


@pytest.fixture(scope="module")
def model_and_tokenizer():
    model, tokenizer = make_chat_model("msw", family="qwen3")
    letters = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()]
    # so that every token is a text, which a stop string can be
    model.base_model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - set(letters))
    return model, tokenizer


@pytest.fixture
def model(model_and_tokenizer):
    return model_and_tokenizer[0]


@pytest.fixture
def end(model):
    """A token that the first row produces after some others, and the second one not so early."""
    rows = greedy(model, PROMPTS).sequences[:, 4:].tolist()
    return next(t for i, t in enumerate(rows[0]) if 1 < i < 7 and t not in rows[0][:i] and t not in rows[1][: i + 3])


def greedy(model, ids, **options):
    options = {"max_new_tokens": LENGTH, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, do_sample=False, return_dict_in_generate=True, **options)


def same_memory(a, b):
    torch.testing.assert_close(dict(a.states), dict(b.states), rtol=1e-5, atol=1e-5)


class EndsAt(StoppingCriteria):
    """Ends a row after a token; refuses to be asked twice about the same text, as criteria with a state may."""

    def __init__(self, token):
        self.token, self.length = token, 0

    def __call__(self, ids, scores, **kwargs):
        assert ids.shape[1] > self.length
        self.length = ids.shape[1]
        return ids[:, -1] == self.token


WAYS = {
    "end-token": lambda end, tokenizer: {"eos_token_id": end},
    "end-token-of-a-config": lambda end, tokenizer: {
        "generation_config": GenerationConfig(
            eos_token_id=[end], do_sample=False, max_new_tokens=LENGTH, return_dict_in_generate=True, pad_token_id=0
        )
    },
    "criterion": lambda end, tokenizer: {"stopping_criteria": [EndsAt(end)]},
    "criterion-and-length": lambda end, tokenizer: {
        "stopping_criteria": [EndsAt(end), MaxLengthCriteria(4 + LENGTH)], "max_new_tokens": 40
    },
    "their-own-criterion": lambda end, tokenizer: {"stopping_criteria": [EosTokenCriteria(end)]},
    "stop-string": lambda end, tokenizer: {"stop_strings": [tokenizer.decode([end])], "tokenizer": tokenizer},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_rows_memory_does_not_depend_on_how_long_the_others_go_on(model_and_tokenizer, end, way):
    model, tokenizer = model_and_tokenizer

    def run(ids):
        options = way(end, tokenizer)
        return model.generate(ids, **options) if "generation_config" in options else greedy(model, ids, **options)

    batch, length = run(PROMPTS), 0
    for row in range(2):
        alone = run(PROMPTS[row : row + 1])
        length = alone.sequences.shape[1]
        assert torch.equal(batch.sequences[row : row + 1, :length], alone.sequences)
        same_memory(batch.memory.select([row]), alone.memory)
        if row == 0:
            assert length < 4 + LENGTH
    assert length > alone.sequences[0].tolist().index(int(alone.sequences[0, 3])) + 1


def test_an_ordinary_token_may_be_the_padding(model):
    plain = greedy(model, PROMPTS)
    padded = greedy(model, PROMPTS, pad_token_id=int(plain.sequences[0, 6]))  # greedy decoding produces it itself
    assert torch.equal(padded.sequences, plain.sequences)
    same_memory(padded.memory, plain.memory)


@pytest.mark.parametrize("way", ["end-token", "criterion", "stop-string"])
def test_beams_that_have_ended_are_written_to_their_end(model_and_tokenizer, end, way):
    model, tokenizer = model_and_tokenizer
    memory = model.write(PROMPTS.flip(0))
    out = greedy(model, PROMPTS, memory=memory, num_beams=3, num_return_sequences=2, **WAYS[way](end, tokenizer))
    ended = 0
    for row, sequence in enumerate(out.sequences.tolist()):
        stop = 4 + sequence[4:].index(end) if end in sequence[4:] else len(sequence) - 1
        ended += end in sequence[4:]
        with torch.no_grad():
            read = model(torch.tensor([sequence[:stop]]), memory=memory.select([row // 2]))
        same_memory(out.memory.select([row]), read.memory)
    assert ended


def test_samples_that_have_ended_keep_their_own_memory(model, end):
    torch.manual_seed(1)
    out = model.generate(
        PROMPTS, do_sample=True, num_return_sequences=3, max_new_tokens=LENGTH, eos_token_id=end, pad_token_id=5,
        return_dict_in_generate=True, top_k=5,
    )  # fmt: skip
    for row, sequence in enumerate(out.sequences.tolist()):
        stop = 4 + sequence[4:].index(end) if end in sequence[4:] else len(sequence) - 1
        with torch.no_grad():
            same_memory(out.memory.select([row]), model(torch.tensor([sequence[:stop]])).memory)
