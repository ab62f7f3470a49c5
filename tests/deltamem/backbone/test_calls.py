"""Calls that can't be meant end in a sentence that says what to do."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

from deltamem import DeltaMemConfig, DeltaMemError, DeltaMemory, get_delta_mem_model
from deltamem.errors import MemoryMismatchError, SegmentsMissingError, UnsupportedModelError

IDS = torch.tensor([[5, 9, 20, 33, 7, 8]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1]])


@pytest.fixture
def model(tiny_model):
    return get_delta_mem_model(tiny_model("qwen3")).eval()


@pytest.fixture
def ssw(tiny_model):
    return get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(strategy="ssw")).eval()


TOKENS = {
    "empty": (torch.zeros(1, 0, dtype=torch.long), "input_ids is empty .*nothing to read or write"),
    "no-rows": (torch.zeros(0, 4, dtype=torch.long), "input_ids is empty"),
    "1-d": (IDS[0], r"must be \[B, T\].*a batch of one: input_ids\[None\]"),
    "3-d": (IDS[None], r"must be \[B, T\]"),
    "floats": (IDS.float(), "must be integers, got torch.float32"),
    "list": ([[5, 9]], "must be a tensor .*got list.*return_tensors='pt'"),
}


@pytest.mark.parametrize("ids,message", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("call", ["forward", "write", "generate", "write_with_gates"])
def test_tokens_are_a_batch_of_rows(model, call, ids, message):
    with pytest.raises(DeltaMemError, match=message):
        getattr(model, call)(ids)


@pytest.mark.parametrize("mask", [(1, 5), (2, 6), (6,), (1, 1, 6, 6), (1, 7)], ids=str)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_the_mask_covers_the_tokens(model, call, mask):
    with pytest.raises(DeltaMemError, match="attention_mask must be the 2-D padding mask"):
        getattr(model, call)(IDS, attention_mask=torch.ones(mask, dtype=torch.long))


def test_with_a_cache_the_mask_covers_its_tokens_too(model):
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    for length in (2, 6, 7, 9):
        mask = torch.ones(1, length, dtype=torch.long)
        with pytest.raises(DeltaMemError, match=r"after 6 cached tokens, that is \(1, 8\)"):
            model(IDS[:, :2], attention_mask=mask, past_key_values=cache, use_cache=True)
    with pytest.raises(DeltaMemError, match="the cache holds 6 tokens and the prompt covers 4"):
        model.generate(IDS[:, :4], past_key_values=cache, max_new_tokens=2)
    with pytest.raises(DeltaMemError, match="must be a transformers Cache, got tuple"):
        model(IDS, past_key_values=((1, 2),))


def test_a_prompt_may_come_without_the_tokens_in_the_cache(model):
    outs, options = [], {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    for begin in (0, 3):
        cache = DynamicCache()
        with torch.no_grad():
            read = model(IDS[:, :3], past_key_values=cache, use_cache=True)
        mask = torch.ones_like(IDS)
        outs.append(
            model.generate(IDS[:, begin:], attention_mask=mask, memory=read.memory, past_key_values=cache, **options)
        )
    assert torch.equal(outs[0].sequences[:, 3:], outs[1].sequences)
    for i, state in outs[0].memory.states.items():
        torch.testing.assert_close(outs[1].memory.states[i], state)


PACKED = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
    "single-tokens": {"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]])},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_packed_documents_would_share_a_memory(model, call, packed):
    with pytest.raises(DeltaMemError, match="several documents are packed into one row.*a row of its own"):
        getattr(model, call)(IDS, **packed)


def test_positions_of_padding_do_not_count(model):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        for padding in (0, 1, 9):
            positions = torch.tensor([[padding, padding, 0, 1, 2, 3]])
            out = model(IDS, attention_mask=mask, position_ids=positions)
            alone = model(IDS[:, 2:])
            torch.testing.assert_close(out.logits[:, 2:], alone.logits)


def test_segments_are_whole_numbers_for_every_token(ssw):
    for segments in (SEGMENTS[:, :4], SEGMENTS.float(), SEGMENTS[0], SEGMENTS.tolist()):
        for call in (ssw, ssw.write, ssw.generate):
            with pytest.raises(DeltaMemError, match=r"segment_ids must have input_ids' shape \(1, 6\)"):
                call(IDS, segment_ids=segments)
    with pytest.raises(SegmentsMissingError):
        ssw.write(IDS)


def test_prompts_written_by_segment_are_not_read_in_chunks(ssw, model):
    options = {"segment_ids": SEGMENTS, "max_new_tokens": 3, "do_sample": False}
    for chunk in ({"prefill_chunk_size": 4}, {"generation_config": GenerationConfig(prefill_chunk_size=4)}):
        with pytest.raises(DeltaMemError, match="prefill_chunk_size cuts the prompt where a segment may go on"):
            ssw.generate(IDS, **options, **chunk)
    memory, options["return_dict_in_generate"] = ssw.write(IDS, segment_ids=SEGMENTS), True
    for each, write in ((ssw, False), (model, True)):  # nothing to cut
        memory = each.write(IDS, segment_ids=SEGMENTS)
        whole, cut = (
            each.generate(IDS, memory=memory, write=write, **options, **more)
            for more in ({}, {"prefill_chunk_size": 4})
        )
        assert torch.equal(whole.sequences, cut.sequences)
        for i, state in whole.memory.states.items():
            torch.testing.assert_close(cut.memory.states[i], state)


REFUSED = {
    "token_healing": ({"token_healing": True}, "takes back the prompt's last tokens"),
    "assistant-of-a-config": (
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens: .*rolls"
    ),
    "no-cache-of-a-config": ({"generation_config": GenerationConfig(use_cache=False)}, "feeds the prompt again"),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "must come as input_ids"),
    "custom_generate": ({"custom_generate": print}, "decoding loop of one's own"),
}  # fmt: skip


@pytest.mark.parametrize("options,message", REFUSED.values(), ids=REFUSED)
def test_what_generate_cannot_do_with_a_memory_is_refused_wherever_it_is_asked_for(model, options, message):
    with pytest.raises(DeltaMemError, match=message):
        model.generate(IDS, max_new_tokens=2, **options)


def test_a_cache_named_in_a_generation_config_is_the_one_used(model):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    plain = model.generate(IDS, **options)
    model.base_model.generation_config.cache_implementation = "static"
    static = model.generate(IDS, **options)
    given = model.generate(IDS, generation_config=GenerationConfig(cache_implementation="static", **options))
    own = model.generate(
        IDS, past_key_values=StaticCache(config=model.base_model.config, max_cache_len=10), cache_implementation=None,
        **options,
    )  # fmt: skip
    for out in (static, given, own):
        assert isinstance(out.past_key_values, StaticCache) and torch.equal(out.sequences, plain.sequences)
        for i, state in plain.memory.states.items():
            torch.testing.assert_close(out.memory.states[i], state)


def test_a_memory_is_float32_where_the_layers_are(model):
    memory = model.new_memory(1)
    for other in (torch.float16, torch.bfloat16):
        states = {i: state.to(other) for i, state in memory.states.items()}
        with pytest.raises(MemoryMismatchError, match="this adapter needs torch.float32 on cpu"):
            model(IDS, memory=type(memory)(states))
    with pytest.raises(MemoryMismatchError, match=r"on meta, this adapter .* memory.to\('cpu'\) moves it"):
        model(IDS, memory=memory.to("meta"))
    narrow = {i: state[..., :4, :4] if i else state for i, state in memory.states.items()}
    with pytest.raises(MemoryMismatchError, match="need"):
        model(IDS, memory=type(memory)(narrow))
    for other in (memory.states, memory.states[0], "models:/memory"):
        with pytest.raises(MemoryMismatchError, match="must be a DeltaMemory .*, got"):
            model(IDS, memory=other)


def test_memories_that_do_not_fit_make_no_batch(model, tiny_model):
    other = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(layers=(0,)))
    with pytest.raises(MemoryMismatchError, match="memories of 2 shapes"):
        DeltaMemory.cat([model.new_memory(1), other.new_memory(1)])
    with pytest.raises(MemoryMismatchError, match="no memory to join"):
        DeltaMemory.cat([])
    with pytest.raises(DeltaMemError, match="at least one sequence, got batch_size=0"):
        model.new_memory(0)
    assert DeltaMemory.cat([model.new_memory(1), model.new_memory(2)]).batch_size == 3


@pytest.mark.parametrize(
    "family,config",
    [
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8}),
        ("lfm2", {"full_attn_idxs": [1]}),
    ],
)
def test_backbones_with_a_state_of_their_own_are_refused(family, config):
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 101,
    }  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **config))
    with pytest.raises(UnsupportedModelError, match="keep a state of their own"):
        get_delta_mem_model(base)
