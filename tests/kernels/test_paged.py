"""Sequences in pages against the definition, each by itself."""

import pytest
import torch

from deltamem_kernels.gates import gate_projections
from deltamem_kernels.naive import naive_delta_scan
from deltamem_kernels.paged import PaddedRows, paged_scan, paged_step, torch_paged_step


def drawn(tokens, states=2, rank=8, pages=7, apart=5):
    """Projections [tokens, 4·N·r], biases, and pages that lie ``apart`` numbers from each other."""
    generator = torch.Generator().manual_seed(tokens)
    projected = torch.randn(tokens, 4 * states * rank, generator=generator)
    bias = torch.randn(states * rank, generator=generator) - 1.5
    raw = torch.randn(pages, states * rank * rank + apart, generator=generator)
    return projected, bias, raw, raw[:, : states * rank * rank].unflatten(1, (states, rank, rank))


def defined(projected, bias, state, writes):
    """Reads [T, N·r] and the state after one sequence, by the definition."""
    q, k, v, beta = gate_projections(projected.double().unsqueeze(0), bias.double(), state.shape[0], state.shape[-1])
    beta = beta * writes.view(1, -1, 1, 1)
    reads, after = naive_delta_scan(q, k, v, beta, state.double().unsqueeze(0))
    return reads[0].flatten(1), after[0]


@pytest.mark.parametrize("step", [paged_step, torch_paged_step], ids=["chosen", "torch"])
@pytest.mark.parametrize("states", [1, 4])
def test_a_step_reads_and_writes_the_named_pages_and_no_other(states, step):
    projected, bias, raw, pages = drawn(3, states)
    page, writes = torch.tensor([5, 0, 2]), torch.tensor([True, False, True])
    before, reads = raw.clone(), torch.empty(3, states * 8)
    was = pages.clone()
    step(projected, bias, pages, page, writes, reads)
    for row, place in enumerate(page.tolist()):
        expected, after = defined(projected[row : row + 1], bias, was[place], writes[row : row + 1])
        torch.testing.assert_close(reads[row].double(), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pages[place].double(), after, atol=1e-5, rtol=1e-5)
        before[place] = raw[place]
    assert torch.equal(pages[0], was[0])
    assert torch.equal(raw, before)
    assert torch.equal(raw[:, -5:], before[:, -5:])


def test_every_sequence_of_a_step_is_written_unless_some_are_chosen():
    projected, bias, raw, pages = drawn(2)
    projected, reads, other = projected.half(), torch.empty(2, 16), pages.clone()
    paged_step(projected, bias, pages, torch.tensor([1, 4]), None, reads)
    torch_paged_step(projected, bias, other, torch.tensor([1, 4]), torch.tensor([True, True]), reads)
    torch.testing.assert_close(pages, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[5], [70, 70], [1, 90, 33]])
def test_a_scan_of_unequal_lengths_is_one_scan_each(lengths):
    projected, bias, raw, pages = drawn(sum(lengths))
    was, page = pages.clone(), torch.arange(len(lengths)) * 2 + 1
    writes = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0)) > 0.3
    reads = torch.empty(sum(lengths), 16)
    paged_scan(projected, bias, pages, page, PaddedRows(lengths, torch.device("cpu")), writes, reads)
    start = 0
    for length, place in zip(lengths, page.tolist(), strict=True):
        own = slice(start, start + length)
        expected, after = defined(projected[own], bias, was[place], writes[own])
        torch.testing.assert_close(reads[own].double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pages[place].double(), after, atol=1e-4, rtol=1e-4)
        start += length
    others = [place for place in range(len(pages)) if place not in page]
    assert torch.equal(pages[others], was[others])


def test_something_of_each_sequence_is_repeated_for_each_of_its_tokens():
    rows = PaddedRows([2, 1, 3], torch.device("cpu"))
    assert rows.repeat(torch.tensor([[7.0], [8.0], [9.0]])).flatten().tolist() == [7, 7, 8, 9, 9, 9]
