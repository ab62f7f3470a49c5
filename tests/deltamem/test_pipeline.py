"""transformers' own pipelines take the model, and a memory with it."""

import pytest
import torch
from transformers import pipeline

from deltamem import encode_messages
from tests.tiny_models import make_chat_model

GREEDY = {"max_new_tokens": 8, "do_sample": False}
ASKED = [{"role": "user", "content": "what was it?"}]


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_a_text_generation_pipeline_reads_a_memory(strategy):
    model, tokenizer = make_chat_model(strategy)
    memory = model.write(
        torch.tensor([encode_messages(tokenizer, [{"role": "user", "content": "a secret"}]).input_ids])
    )
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    told = answer(ASKED, memory=memory, write=False, **GREEDY)[0]["generated_text"][-1]["content"]
    ids = torch.tensor([encode_messages(tokenizer, ASKED, True).input_ids])
    out = model.generate(ids, memory=memory, write=False, **GREEDY)
    assert told == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert told != answer(ASKED, **GREEDY)[0]["generated_text"][-1]["content"]
