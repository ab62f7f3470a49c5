"""The chunked recurrence is the definition: values, gradients, masks, extremes, splits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from deltamem_kernels import delta_scan, gate_projections, gated_delta_scan


def inputs(batch, tokens, states, rank, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    projected = draw(batch, tokens, 4 * states * rank)
    bias = draw(states * rank) - 1.5
    state = draw(batch, states, rank, rank)
    mask = torch.rand(batch, tokens, generator=generator) > 0.3
    return projected, bias, state, mask


@pytest.mark.parametrize(
    ("states", "rank", "tokens"),
    [(states, rank, tokens) for states, rank in [(1, 8), (4, 8), (2, 4), (1, 16)]
     for tokens in [1, 4, 5, 31, 32, 33, 63, 500]] + [(1, 64, 40), (1, 128, 4)],
)  # fmt: skip
def test_chunked_is_naive(tokens, states, rank):
    projected, bias, state, mask = inputs(3, tokens, states, rank)
    for m in (None, mask, torch.zeros_like(mask)):
        expected = gated_delta_scan(projected, bias, state, m, backend="naive")
        actual = gated_delta_scan(projected, bias, state, m, backend="torch")
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 69), st.integers(0, 10**6))
def test_a_split_scan_is_one_scan(tokens, cut, seed):
    cut = min(cut, tokens)
    q, k, v, beta = gate_projections(*inputs(2, tokens, 2, 8, seed=seed)[:2], 2, 8)
    _, _, state, mask = inputs(2, tokens, 2, 8, seed=seed)
    whole = delta_scan(q, k, v, beta, state, mask)
    first, middle = delta_scan(*(x[:, :cut] for x in (q, k, v, beta)), state, mask[:, :cut])
    second, end = delta_scan(*(x[:, cut:] for x in (q, k, v, beta)), middle, mask[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, whole[1], rtol=1e-9, atol=1e-9)


def test_gradcheck_through_the_chunks():
    projected, bias, state, mask = inputs(1, 9, 1, 4)
    leaves = [x.requires_grad_() for x in (projected, bias, state)]
    assert torch.autograd.gradcheck(lambda p, b, s: gated_delta_scan(p, b, s, mask, backend="torch"), leaves)


@pytest.mark.parametrize("gate", [-40.0, 40.0, "mixed"])
def test_extreme_gates_in_float32(gate):
    projected, bias, state, _ = inputs(2, 200, 1, 8, dtype=torch.float32)
    _, k, v, beta = gate_projections(projected, bias, 1, 8)
    beta = torch.sigmoid(torch.full_like(beta, gate) if gate != "mixed" else 60 * torch.randn_like(beta))
    args = [x.requires_grad_() for x in (k.detach().clone(), k.detach(), v.detach(), beta, state)]
    results = []
    for backend, dtype in (("torch", torch.float32), ("naive", torch.float64)):
        copies = [x.detach().to(dtype).requires_grad_() for x in args]
        reads, end = delta_scan(*copies, backend=backend)
        (reads.square().sum() + end.square().sum()).backward()
        results.append([reads, end, *(x.grad for x in copies)])
    for actual, expected in zip(*results, strict=True):
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 1e-5, error


def test_masked_tokens_change_nothing():
    projected, bias, state, _ = inputs(2, 40, 1, 8)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[:, 10:30] = False
    reads, end = gated_delta_scan(projected, bias, state, mask)
    kept = torch.cat([projected[:, :10], projected[:, 30:]], 1)
    reads_kept, end_kept = gated_delta_scan(kept, bias, state)
    torch.testing.assert_close(end, end_kept)
    torch.testing.assert_close(torch.cat([reads[:, :10], reads[:, 30:]], 1), reads_kept)
    assert (reads[:, 10:30] == 0).all()


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        gated_delta_scan(*inputs(1, 3, 1, 8)[:3], backend="cuda")


def test_a_compiler_sees_one_operator_for_every_length():
    torch._dynamo.reset()
    compiler = CompileCounter()
    compiled = torch.compile(gated_delta_scan, fullgraph=True, dynamic=True, backend=compiler)
    for tokens in (5, 40, 70):
        projected, bias, state, mask = inputs(2, tokens, 2, 4)
        given = [x.requires_grad_() for x in (projected, bias, state)]
        found = []
        for scan in (gated_delta_scan, compiled):
            outputs = scan(*given, mask)
            found.append((*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), given)))
        torch.testing.assert_close(found[1], found[0])
    assert (compiler.frame_count, compiler.op_count) == (1, 3)  # the operator, and its two results taken apart


def test_the_operator_is_what_its_registrations_say():
    projected, bias, state, mask = inputs(2, 40, 2, 4)
    given = [x.requires_grad_() for x in (projected, bias, state)]
    for m in (None, mask):
        torch.library.opcheck(torch.ops.deltamem.torch_scan.default, (*given, m))
