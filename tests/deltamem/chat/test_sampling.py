"""How a turn's next token is chosen."""

import pytest
import torch

from deltamem import ChatSession, DeltaMemError
from deltamem.chat.reply import TurnOptions
from deltamem.chat.sampling import Sampler
from tests.tiny_models import make_chat_model

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def draws(tokens=(), prompt_length=0, **options):
    """The tokens that come out over many seeds."""
    return {
        Sampler(TurnOptions(temperature=1.0, seed=seed, **options), 4, SCORES.device).choose(
            SCORES, tokens, prompt_length
        )
        for seed in range(200)
    }


def likeliest(tokens, prompt_length=0, **options):
    return Sampler(TurnOptions(**options), 4, SCORES.device).choose(SCORES, tokens, prompt_length)


def test_each_way_of_drawing_leaves_the_unlikely_out():
    assert draws() == {0, 1, 2, 3}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_p=0.6) == {0}
    assert draws(min_p=0.2) == {0, 1}  # probabilities are 0.64, 0.24, 0.09, 0.03
    assert draws(typical_p=0.2) == {1}  # whose surprise, 1.44, is nearest the expected one, 0.95


def test_penalties_and_biases_change_which_token_is_likeliest():
    assert likeliest([0], repetition_penalty=3.0) == 1, "the prompt counts"
    assert likeliest([0], prompt_length=1, presence_penalty=1.5) == 0, "the prompt doesn't count"
    assert likeliest([3, 0], prompt_length=1, presence_penalty=1.5) == 1
    assert likeliest([0, 0], frequency_penalty=0.4) == 0
    assert likeliest([0, 0, 0], frequency_penalty=0.4) == 1
    assert likeliest([], logit_bias={3: 5.0}) == 3
    assert likeliest([], logit_bias={0: -100.0}) == 1


def test_a_bias_for_a_token_that_is_not_there_is_refused():
    with pytest.raises(DeltaMemError, match="there is no token 259; the vocabulary ends at 258"):
        ChatSession(*make_chat_model()).send("hi", logit_bias={259: 1.0})


def test_a_chat_heeds_the_penalties_as_generate_does():
    model, tokenizer = make_chat_model()
    chat = ChatSession(model, tokenizer)
    reply = chat.send("hello", max_new_tokens=20, repetition_penalty=1.5)
    prompt = torch.tensor([chat.state.tokens[: reply.prompt_tokens]])
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.5)
    assert list(chat.state.tokens) == out[0].tolist()[: len(chat.state.tokens)]
    assert reply.text != ChatSession(model, tokenizer).send("hello", max_new_tokens=20).text


def test_a_backbones_own_penalty_is_heeded_where_nobody_says():
    model, tokenizer = make_chat_model()
    model.base_model.generation_config.repetition_penalty = 1.05
    assert ChatSession(model, tokenizer).runtime.sampling["repetition_penalty"] == 1.05
