"""A backbone whose longrope makes every key anew once a text grows beyond a length (Phi-3)."""

import inspect

import pytest
import torch
from transformers import DynamicCache, Phi3ForCausalLM

from deltamem import DeltaMemConfig, DeltaMemError, get_delta_mem_model
from deltamem.backbone.facts import longrope_switch, window
from deltamem.chat.session import ChatSession
from tests.tiny_models import make_chat_model

SWITCH = 16
ROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": SWITCH,
    },
}
# Before that was mended, transformers fed one token without any cache at the switch.
REREADS = "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)
rereads = pytest.mark.skipif(not REREADS, reason="this transformers doesn't read a text again")
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}


def tokens(batch, length, seed=0):
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapted(tiny_model, strategy):
    torch.manual_seed(1)
    config = DeltaMemConfig(strategy=strategy, output_init="random", online_gain=0.5)
    return get_delta_mem_model(tiny_model("phi3", "sdpa", **ROPE), config).requires_grad_(False).eval()


def test_the_window_is_the_length_up_to_which_keys_stay_good(tiny_model):
    config = tiny_model("phi3", **ROPE).config
    assert longrope_switch(config) == window(config) == SWITCH
    plain = tiny_model("phi3").config
    assert longrope_switch(plain) is None and window(plain) == 4096


@pytest.mark.parametrize(
    "length",
    [pytest.param(12, marks=rereads), pytest.param(16, marks=rereads), 20],
    ids=["across", "at", "beyond"],
)
@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_generating_across_the_switch_is_reading_the_whole_text_at_every_step(tiny_model, strategy, length):
    model, sequences = adapted(tiny_model, strategy), tokens(2, length)
    memory = model.write(tokens(2, 9, 1))
    out = model.generate(sequences, memory=memory, **OPTIONS)
    with torch.no_grad():
        for _ in range(8):
            step = model(sequences, memory=memory)
            sequences = torch.cat([sequences, step.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, sequences)
    for i, state in step.memory.states.items():
        torch.testing.assert_close(out.memory.states[i], state, rtol=1e-4, atol=1e-5)


@rereads
@torch.no_grad()
def test_ssw_reads_the_text_again_at_the_switch_and_writes_its_new_token_only(tiny_model):
    model, ids = adapted(tiny_model, "ssw"), tokens(2, 12)
    segments = torch.zeros_like(ids)
    memory = model.write(tokens(2, 9, 1), segment_ids=segments[:, :9])
    out = model.generate(ids, memory=memory, segment_ids=segments, **OPTIONS)
    before = model.generate(ids, memory=memory, segment_ids=segments, **{**OPTIONS, "max_new_tokens": 5})
    whole = before.sequences  # 17 tokens, of which 16 were fed
    assert torch.equal(out.sequences[:, :17], whole)
    new = torch.full_like(whole, -1)
    new[:, -1] = 0
    read = model(whole, memory=before.memory, segment_ids=new, use_cache=True)
    for length in (18, 19, 20):
        token = read.logits[:, -1:].argmax(-1)
        assert torch.equal(out.sequences[:, length - 1 : length], token)
        if length < 20:
            read = model(token, memory=read.memory, past_key_values=read.past_key_values, use_cache=True)
    for i, state in read.memory.states.items():
        torch.testing.assert_close(out.memory.states[i], state, rtol=1e-4, atol=1e-5)


@rereads
def test_rows_that_ended_before_the_switch_are_not_written_beyond_it(tiny_model):
    model, ids = adapted(tiny_model, "tsw"), tokens(2, 12)
    rows = model.generate(ids, **OPTIONS).sequences[:, 12:].tolist()
    end = next(t for i, t in enumerate(rows[0]) if 0 < i < 4 and t not in rows[0][:i] + rows[1])
    out = model.generate(ids, **{**OPTIONS, "eos_token_id": end, "pad_token_id": 7})
    stop = 12 + rows[0].index(end)
    with torch.no_grad():
        whole = torch.cat([ids[:1], out.sequences[:1, 12:19]], 1)
        mask = torch.ones_like(whole)
        mask[:, stop:] = 0
        positions = torch.arange(whole.shape[1])[None]
        alone = model(whole, attention_mask=mask, position_ids=positions).memory  # long factors, as for the whole text
    for i in alone.states:
        torch.testing.assert_close(out.memory.select([0]).states[i], alone.states[i], rtol=1e-4, atol=1e-5)


def test_a_cache_that_was_made_with_short_factors_does_not_go_on_beyond(tiny_model):
    model = get_delta_mem_model(tiny_model("phi3", **ROPE)).eval()
    cache = DynamicCache()
    with torch.no_grad():
        out = model(tokens(1, 12), past_key_values=cache, use_cache=True)
        with pytest.raises(DeltaMemError, match="other factors beyond 16 tokens: a cache of 12 .* can't go on to 17"):
            model(tokens(1, 5), memory=out.memory, past_key_values=cache, use_cache=True)
        with pytest.raises(DeltaMemError, match="a cache of 12 .* can't go on to 20"):
            model.generate(tokens(1, 20), memory=out.memory, past_key_values=cache, **OPTIONS)
        message = "its first 12 came in a cache" if REREADS else "drops the cache at 16 tokens"
        with pytest.raises(DeltaMemError, match=message):
            model.generate(tokens(1, 14), memory=out.memory, past_key_values=cache, **OPTIONS)
        long = DynamicCache()  # one that began beyond the switch goes on as it is
        model(tokens(1, 18), past_key_values=long, use_cache=True)
        model(tokens(1, 4), past_key_values=long, use_cache=True)


def test_a_chat_stays_where_its_keys_are_good():
    rope = {**ROPE, "original_max_position_embeddings": 80}
    rope["rope_parameters"] = {**ROPE["rope_parameters"], "original_max_position_embeddings": 80}
    model, tokenizer = make_chat_model("tsw", "phi3", base=rope)
    chat = ChatSession(model, tokenizer)
    assert chat.runtime.window == 80
    for text in ("one", "two", "three", "four"):
        chat.send(text, max_new_tokens=12)
        assert chat.state.keys.length <= 80
        ids = torch.tensor([chat.state.tokens])
        with torch.no_grad():  # what the cache holds is what one pass over its tokens makes, with the short factors
            keys = model.base_model(ids, use_cache=True).past_key_values.layers[0].keys
        torch.testing.assert_close(chat.state.keys.layers[0][0], keys, rtol=1e-4, atol=1e-4)
    assert chat.forgotten
