"""Which implementation answers, where the caller, the process or the environment chooses one."""

import pytest
import torch

import deltamem_kernels
from deltamem_kernels import choose_backend, delta_scan, gated_delta_scan, scan
from deltamem_kernels.device import VARIABLE, chosen_backend


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    choose_backend(None)


@pytest.fixture
def asked(monkeypatch):
    """The names of the implementations that ran, in order."""
    ran = []
    for table in (scan.BACKENDS, scan.GATED_BACKENDS):
        for name, run in list(table.items()):
            monkeypatch.setitem(table, name, lambda *args, name=name, run=run: (ran.append(name), run(*args))[1])
    return ran


def inputs(tokens=6):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 1, 4, generator=generator) for _ in range(3))
    return q, k, v, torch.rand(2, tokens, 1, 4, generator=generator), torch.zeros(2, 1, 4, 4)


def test_the_process_the_environment_and_the_call_choose_in_turn(asked, monkeypatch):
    expected = delta_scan(*inputs())
    monkeypatch.setenv(VARIABLE, "naive")
    gated_delta_scan(torch.randn(2, 6, 16), torch.zeros(4), torch.zeros(2, 1, 4, 4))
    choose_backend("torch")
    delta_scan(*inputs())
    results = delta_scan(*inputs(), backend="naive")
    choose_backend(None)
    delta_scan(*inputs())
    assert asked == ["torch", "naive", "torch", "naive", "naive"]
    torch.testing.assert_close(results, expected)


def test_a_name_that_is_none_says_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="choose_backend='fast': choose one of naive, torch, triton"):
        choose_backend("fast")
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="DELTAMEM_BACKEND='cuda': choose one of"):
        delta_scan(*inputs())
    monkeypatch.setenv(VARIABLE, "")
    assert chosen_backend() is None


@pytest.mark.skipif("triton" in deltamem_kernels.BACKENDS, reason="has the kernels")
def test_triton_is_not_replaced_in_silence_where_it_was_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="needs a CUDA GPU and the package triton"):
        delta_scan(*inputs())


@pytest.mark.gpu
def test_a_gpu_computes_without_triton_where_that_was_chosen(asked):
    from deltamem_kernels.device import fits_triton, has_triton

    arguments = [x.cuda() for x in inputs()]
    expected = delta_scan(*arguments)
    choose_backend("torch")
    assert not has_triton(arguments[0]) and not fits_triton(arguments[-1])
    torch.testing.assert_close(delta_scan(*arguments), expected, rtol=1e-4, atol=1e-5)
    assert asked == ["triton", "torch"]
