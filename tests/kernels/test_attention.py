"""Attention after a shared beginning is attention over the beginning and what follows it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from deltamem_kernels import attention, prefixed_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(seed, rows, heads, group, new, prefix, own, dim, dtype=torch.float64):
    """Every argument but the scale; the mask leaves some queries nothing of their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    mask = (torch.rand(rows, 1, new, own, generator=generator) < 0.6).to(DEVICE)
    return (
        normal(rows, group * heads, new, dim),
        *(normal(1, heads, prefix, dim) for _ in range(2)),
        *(normal(rows, heads, own, dim) for _ in range(2)),
        mask,
    )


def whole(query, prefix_keys, prefix_values, keys, values, mask, scale):
    """The definition: the beginning copied before every row's own keys."""
    group, rows = query.shape[1] // keys.shape[1], query.shape[0]
    k, v = (
        torch.cat([first.expand(rows, -1, -1, -1), own], 2).repeat_interleave(group, 1)
        for first, own in ((prefix_keys, keys), (prefix_values, values))
    )
    seen = torch.cat([mask.new_ones(*mask.shape[:3], prefix_keys.shape[2]), mask], 3)
    return scaled_dot_product_attention(query, k, v, seen, scale=scale)


sizes = st.integers(1, 4)


@settings(max_examples=60)
@given(st.integers(0, 99), sizes, sizes, sizes, st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), sizes)
def test_is_attention_over_both(seed, rows, heads, group, new, prefix, own, dim):
    arguments = drawn(seed, rows, heads, group, new, prefix, own, dim)
    found = prefixed_attention(*(x if x.dtype == torch.bool else x.float() for x in arguments), 0.7)
    torch.testing.assert_close(found.double(), whole(*arguments, 0.7), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_beginning_in_blocks(dtype, monkeypatch):
    monkeypatch.setattr(attention, "MOST_SCORES", 1)  # blocks of 128, the least there is
    arguments = drawn(3, 3, 2, 4, 5, 517, 7, 16, dtype)
    exact = whole(*(x if x.dtype == torch.bool else x.double() for x in arguments), 0.25)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    found = prefixed_attention(*arguments, 0.25)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


def test_large_scores_do_not_overflow():
    query, prefix_keys, *rest = drawn(4, 2, 2, 1, 3, 40, 6, 8, torch.float32)
    found = prefixed_attention(query * 300, prefix_keys * 300, *rest, 1.0)
    torch.testing.assert_close(found, whole(query * 300, prefix_keys * 300, *rest, 1.0), atol=1e-3, rtol=1e-3)
