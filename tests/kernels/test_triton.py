"""The Triton kernels against the definition: on a GPU directly, elsewhere under Triton's interpreter.

The interpreter is chosen when a kernel is decorated, so :func:`test_under_the_interpreter` runs this file again in
a process of its own. Tests marked ``gpu`` are those that need the compiled kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from deltamem_kernels.attention import naive_decode_attention  # noqa: E402
from deltamem_kernels.gates import gate_projections  # noqa: E402
from deltamem_kernels.naive import naive_delta_scan  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1 (test_under_the_interpreter)"
)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def relative(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return ((candidate.double() - reference).norm() / reference.norm().clamp_min(1e-12)).item()


def assert_close(candidates, references, names, bound: float) -> None:
    errors = {n: relative(c, r) for n, c, r in zip(names, candidates, references, strict=True)}
    assert all(error <= bound for error in errors.values()), errors  # NaN fails too


def random_inputs(batch, tokens, states, rank, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    projected = draw(batch, tokens, 4 * states * rank).to(dtype)
    return projected, draw(states * rank) - 1.5, draw(batch, states, rank, rank)


def random_mask(batch, tokens, seed=1):
    """A few tokens off, one long run off, and in a batch of several the first row off altogether."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.2
    mask[:, tokens // 3 : tokens // 2] = False
    if batch > 1:
        mask[0] = False
    return mask.to(DEVICE)


def value_and_gradients(scan, inputs, seed=2):
    """(reads, state, gradients of a random weighting of both)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = scan(*leaves)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return (*outputs, *torch.autograd.grad(outputs, leaves, weights))


def compare(inputs, mask, bound, gradient_bound):
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    states, rank = inputs[2].shape[1], inputs[2].shape[-1]

    def definition(projected, bias, state):
        return naive_delta_scan(*gate_projections(projected, bias, states, rank), state, mask)

    expected = value_and_gradients(definition, [x.double() for x in inputs])
    got = value_and_gradients(lambda *leaves: triton_gated_delta_scan(*leaves, mask), inputs)
    assert got[2].dtype == inputs[0].dtype
    assert_close(got[:2], expected[:2], ("reads", "state"), bound)
    assert_close(got[2:], expected[2:], ("d projected", "d bias", "d state"), gradient_bound)


@runs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("batch", "tokens", "states", "rank"),
    [(1, 1, 1, 8), (1, 17, 4, 4), (2, 63, 1, 8), (1, 21, 1, 16), (1, 5, 1, 32)],
    ids=lambda x: str(x),
)
def test_reads_state_and_gradients_match_the_definition(batch, tokens, states, rank, masked):
    if INTERPRETED and masked == (rank in (4, 32)):
        pytest.skip("half of the cases are enough for the interpreter")
    mask = random_mask(batch, tokens) if masked else None
    compare(random_inputs(batch, tokens, states, rank), mask, 1e-6, 2e-6)


@runs_kernels
def test_several_groups_of_chunks(monkeypatch):
    from deltamem_kernels import triton_scan

    # Chunks of 8 tokens in groups of 4: what lengths beyond 512 bring, at a length that the interpreter can do.
    plan = triton_scan.Plan(rank=8, length=8, group=4, groups=3)
    monkeypatch.setattr(triton_scan, "plan_for", lambda tokens, rank: plan)
    compare(random_inputs(1, 85, 1, 8), random_mask(1, 85), 1e-6, 2e-6)


@runs_kernels
def test_closed_and_open_gates_of_finished_inputs():
    from deltamem_kernels.triton_scan import triton_delta_scan

    projected, _, state = random_inputs(1, 30, 1, 8)
    q, k, v, beta = gate_projections(projected, torch.zeros(8, device=DEVICE), 1, 8)
    beta[:, ::3], beta[:, 1::3, :, ::2] = 0.0, 1.0
    inputs = (q, k, v, beta, state)
    expected = value_and_gradients(naive_delta_scan, [x.double() for x in inputs])
    names = ("reads", "state", "dq", "dk", "dv", "dbeta", "dstate")
    assert_close(value_and_gradients(triton_delta_scan, inputs), expected, names, 2e-6)


@runs_kernels
def test_operator_registrations_and_torch_compile():
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    projected, bias, state = (x.requires_grad_() for x in random_inputs(1, 3, 1, 8))
    packed = projected.unflatten(-1, (4, 1, 8))
    torch.library.opcheck(
        torch.ops.deltamem.scan.default,
        (packed.detach(), bias.detach(), state.detach(), None),
        test_utils=("test_schema", "test_faketensor"),
    )

    def loss(projected, bias, state):
        reads, new_state = triton_gated_delta_scan(projected, bias, state)
        return (reads * 2).sum() + new_state.square().sum()

    expected = torch.autograd.grad(loss(projected, bias, state), (projected, bias, state))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(projected, bias, state), (projected, bias, state))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@runs_kernels
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
def test_one_token_step_matches_the_definition(in_place):
    from deltamem_kernels.triton_step import triton_delta_step

    batch, states, rank, hidden = 3, 2, 8, 96
    _, bias, state = random_inputs(batch, 1, states, rank)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, hidden, generator=generator).to(DEVICE)
    in_proj = torch.randn(4 * states * rank, hidden, generator=generator).to(DEVICE) / 8
    mask = torch.tensor([True, False, True], device=DEVICE)
    writes = torch.tensor([True, True, False], device=DEVICE)
    gates = gate_projections((x.double() @ in_proj.double().T)[:, None], bias.double(), states, rank)
    expected = naive_delta_scan(*gates, state.double(), mask[:, None])
    expected = expected[0], torch.where(writes[:, None, None, None], expected[1], state)
    target = state.clone() if in_place else None
    reads, new_state = triton_delta_step(x, in_proj, bias, state if not in_place else target, mask, target, writes)
    assert not in_place or new_state is target
    assert_close((reads, new_state), (expected[0][:, 0], expected[1]), ("reads", "state"), 1e-6)


@runs_kernels
@pytest.mark.parametrize("chosen", [False, True])
def test_a_step_in_pages_matches_the_definition(chosen):
    from deltamem_kernels.triton_paged import triton_paged_step

    states, rank = 2, 8
    projected, bias, state = random_inputs(3, 1, states, rank)
    raw = torch.randn(6, states * rank * rank + 2, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    pages, page = raw[:, :-2].unflatten(1, (states, rank, rank)), torch.tensor([4, 0, 3], device=DEVICE)
    pages[page], before = state, raw.clone()
    writes = torch.tensor([True, False, True], device=DEVICE) if chosen else None
    expected = naive_delta_scan(*gate_projections(projected.double(), bias.double(), states, rank), state.double())
    after = expected[1] if writes is None else torch.where(writes[:, None, None, None], expected[1], state)
    reads = torch.empty(3, states * rank, device=DEVICE)
    triton_paged_step(projected[:, 0], bias, pages, page, writes, reads)
    assert_close((reads.view(3, states, rank), pages[page]), (expected[0][:, 0], after), ("reads", "state"), 1e-6)
    own = state.clone()
    triton_paged_step(projected[:, 0], bias, own, None, writes, reads)
    assert_close((reads.view(3, states, rank), own), (expected[0][:, 0], after), ("reads", "state"), 1e-6)
    others = torch.tensor([1, 2, 5], device=DEVICE)
    assert torch.equal(raw[others], before[others]) and torch.equal(raw[:, -2:], before[:, -2:])


@runs_kernels
@pytest.mark.parametrize("counts", [(30,), (33, 8, 5, 7)])
def test_a_row_times_several_weights_is_each_ones_product(counts):
    from deltamem_kernels.triton_products import triton_row_products

    generator = torch.Generator().manual_seed(8)
    x = torch.randn(1, 1, 600, generator=generator).to(DEVICE)
    weights = [torch.randn(count, 600, generator=generator).to(DEVICE) for count in counts]
    expected = [x.double() @ weight.double().T for weight in weights]
    assert_close(triton_row_products(x, weights), expected, counts, 1e-6)
    with pytest.raises(ValueError, match="one row"):
        triton_row_products(x.expand(2, 1, 600), weights)


@runs_kernels
def test_steer_adds_the_scaled_product():
    from deltamem_kernels.triton_step import triton_steer

    generator = torch.Generator().manual_seed(4)
    out, reads, weight = (torch.randn(*s, generator=generator).to(DEVICE) for s in ((2, 200), (2, 16), (200, 16)))
    expected = out.double() + 0.3 * reads.double() @ weight.double().T
    triton_steer(out, reads, weight, 0.3)
    assert_close((out,), (expected,), ("out",), 1e-6)


@runs_kernels
@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "window", "softcap"),
    [(4, 4, 16, None, None), (6, 2, 64, None, 2.0), (9, 3, 48, 100, None), (32, 1, 32, 64, None)],
)
def test_decode_attention_matches_the_definition(heads, key_heads, dim, window, softcap):
    from deltamem_kernels.triton_attention import triton_decode_attention

    generator = torch.Generator().manual_seed(5)
    shapes = (3, heads, dim), (3, key_heads, 200, dim), (3, key_heads, 200, dim)
    query, keys, values = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    lengths = torch.tensor([1, 129, 200], device=DEVICE)
    doubles = (x.double() for x in (query, keys, values))
    expected = naive_decode_attention(*doubles, lengths, 0.3, window, softcap)
    got = triton_decode_attention(query, keys, values, lengths, 0.3, window, softcap)
    assert_close((got,), (expected,), ("out",), 2e-6)


def test_decode_attention_is_attention_over_the_keys_that_count():
    generator = torch.Generator().manual_seed(6)
    query, keys, values = (torch.randn(*s, generator=generator) for s in ((2, 6, 16), (2, 3, 20, 16), (2, 3, 20, 16)))
    got = naive_decode_attention(query, keys, values, torch.tensor([7, 20]), 0.25, window=5)
    for row, (first, last) in enumerate(((2, 7), (15, 20))):
        part = slice(first, last)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row, :, None], keys[row, :, part], values[row, :, part], scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(got[row], expected[:, 0])


def test_what_the_kernels_do_not_take_is_an_error():
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    projected, bias, state = (x.cpu() for x in random_inputs(1, 4, 1, 8))
    with pytest.raises(ValueError, match="state must be float32"):
        triton_gated_delta_scan(projected, bias, state.double())
    with pytest.raises(ValueError, match="mask must be bool"):
        triton_gated_delta_scan(projected, bias, state, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16"):
        triton_gated_delta_scan(projected.double(), bias, state)
    with pytest.raises(ValueError, match="supports ranks"):
        triton_gated_delta_scan(projected[..., :8], bias[:2], state[..., :2, :2])


def test_no_tokens_leave_the_state_alone():
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    projected, bias, state = random_inputs(2, 0, 1, 8)
    reads, new_state = triton_gated_delta_scan(projected, bias, state)
    assert reads.shape == (2, 0, 1, 8) and torch.equal(new_state, state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("tokens", [1, 63, 500, 8191])
def test_gpu_matches_float64(tokens, states, dtype):
    inputs = random_inputs(2, tokens, states, 8, dtype, seed=tokens)
    # The projection's gradient is returned in its own dtype.
    compare(inputs, random_mask(2, tokens), 1e-5, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
def test_gpu_repeated_launches_follow_dtypes_and_alignment():
    """Repeats skip Triton's own look-up (triton_scan._launch): what it would have noticed must still be noticed."""
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    projected, bias, state = random_inputs(1, 40, 1, 8)
    expected = triton_gated_delta_scan(projected, bias.bfloat16().float(), state)
    shifted = torch.cat([bias[:1], bias.bfloat16().float()])[1:]
    assert shifted.data_ptr() % 16
    for again in (bias.bfloat16(), shifted, bias.bfloat16()):
        assert all(
            torch.equal(a, b) for a, b in zip(triton_gated_delta_scan(projected, again, state), expected, strict=True)
        )


@pytest.mark.gpu
def test_gpu_runs_are_equal_to_the_bit():
    from deltamem_kernels.triton_scan import triton_gated_delta_scan

    inputs = random_inputs(2, 5000, 4, 8, torch.bfloat16)
    first, second = (value_and_gradients(triton_gated_delta_scan, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
