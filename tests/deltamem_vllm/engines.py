"""A tiny random backbone with adapters, in vLLM and beside it in our own code."""

import torch
from vllm import LLM, SamplingParams

from deltamem import DeltaMemConfig, DeltaMemory, get_delta_mem_model
from deltamem_vllm.engine import engine_arguments
from deltamem_vllm.handover import Handover, from_bytes, to_bytes
from tests.tiny_models import make_tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}  # heads that vLLM's attention on CPUs takes
TOKENS = 8


def draw_prompts(*lengths, seed=0):
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]


def make_models(folder, family="llama", base=(), adapters=None):
    """Save a backbone and, under their names, adapters that steer strongly; the DeltaMemModel of each."""
    backbone = make_tiny_model(family, "eager", **{**SIZES, **dict(base)})
    models = {}
    for seed, (name, adapter) in enumerate((adapters or {"adapter": {}}).items(), start=1):
        torch.manual_seed(seed)
        model = get_delta_mem_model(backbone, DeltaMemConfig(output_init="random", online_gain=0.5, **adapter))
        with torch.no_grad():
            for _, layer in model.memory_layers.items():
                layer.in_proj.normal_(0, 0.2)
                if layer.norm_limit is not None:
                    layer.norm_limit.fill_(0.1)
        models[name] = model.requires_grad_(False).eval()
        model.save_pretrained(folder / name)
    backbone.generation_config.eos_token_id = None
    backbone.save_pretrained(folder / "base")
    return models


class TinyEngine:
    """``vllm.LLM`` and the models that it has to equal; ``model`` is the first."""

    def __init__(self, folder, family="llama", base=(), adapter=(), adapters=None, **settings):
        self.models = make_models(folder, family, base, adapters or {"adapter": dict(adapter)})
        self.model = next(iter(self.models.values()))
        named = {name: str(folder / name) for name in adapters} if adapters else str(folder / "adapter")
        arguments = engine_arguments(str(folder / "base"), named)
        settings = {"enable_prefix_caching": False, "max_model_len": 1024, "disable_log_stats": False, **settings}
        self.llm = LLM(**arguments, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, seed=0, **settings)
        self._asked = 0

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm

    @property
    def layers(self):
        return sorted(int(layer) for layer in self.model.memory_layers)

    def run(self, prompts, memories=None, tokens=TOKENS, adapters=None, **handover):
        """[(tokens, their log-probabilities, the memory after)] of prompts answered together, each by its adapter."""
        adapters = adapters or [None] * len(prompts)
        keys, requests, how = [], [], []
        for row, prompt in enumerate(prompts):
            self._asked += 1
            keys.append(f"key {self._asked}")
            memory = None if memories is None else to_bytes(memories[row])
            params = Handover(memory=memory, keep=keys[-1], adapter=adapters[row], **handover).params()
            requests.append({"prompt_token_ids": prompt})
            how.append(
                SamplingParams(
                    temperature=0, max_tokens=tokens, logprobs=0, extra_args={"kv_transfer_params": params},
                    detokenize=False, ignore_eos=True,
                )
            )  # fmt: skip
        replies = self.llm.generate(requests, how, use_tqdm=False)
        asked = zip(replies, keys, adapters, strict=True)
        return [(*_told(reply), self.take(key, adapter)) for reply, key, adapter in asked]

    def take(self, key, adapter=None):
        """A kept memory; it is kept in the step after the last."""
        self.llm.llm_engine.step()
        raw = self.llm.collective_rpc("take_memory", args=(key,))[0]
        return None if raw is None else from_bytes(raw, self.models.get(adapter, self.model).config, self.layers)

    def expected(self, prompt, memory=None, tokens=TOKENS, write=True, write_from=0, adapter=None):
        """The same as one of :meth:`run`, by our own ``generate``."""
        model, cache = self.models.get(adapter, self.model), None
        if write_from:
            read = model(
                torch.tensor([prompt[:write_from]]), memory=memory, write=False, use_cache=True, logits_to_keep=1
            )
            cache = read.past_key_values
        out = model.generate(
            torch.tensor([prompt]), memory=memory, write=write, past_key_values=cache, max_new_tokens=tokens,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        chosen = out.sequences[0, len(prompt) :].tolist()
        scores = [float(s[0].log_softmax(-1)[token]) for s, token in zip(out.logits, chosen, strict=True)]
        return chosen, scores, out.memory


def metric(engine, name):
    """One of the engine's own numbers."""
    return {found.name: getattr(found, "value", 0) for found in engine.llm.get_metrics()}[f"vllm:{name}"]


def _told(reply):
    chosen = list(reply.outputs[0].token_ids)
    scores = [place[token].logprob for place, token in zip(reply.outputs[0].logprobs, chosen, strict=True)]
    return chosen, scores


def assert_equal(found, expected):
    """Tokens equal; log-probabilities and memories up to float32's rounding."""
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), atol=2e-4, rtol=0)
    assert_same_memory(found[2], expected[2])


def assert_same_memory(found: DeltaMemory, expected: DeltaMemory, atol=1e-4):
    assert found.states.keys() == expected.states.keys()
    for layer, state in expected.states.items():
        torch.testing.assert_close(found.states[layer], state, atol=atol, rtol=1e-4)
