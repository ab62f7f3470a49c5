"""What a backbone and its tokenizer say about themselves."""

import pytest
import torch

from deltamem.backbone.facts import computed_dtype


@pytest.mark.parametrize("supported", [True, False])
def test_a_half_precision_that_a_cpu_would_emulate_gives_way_to_float32(supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert computed_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if supported else torch.float32)
    assert computed_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert computed_dtype(torch.float32, "cpu") == torch.float32
