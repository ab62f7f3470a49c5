"""The recurrence alone: Triton, chunked PyTorch, and a serial scan, side by side: `python -m benchmarks.scan --help`.

The serial scan is a clone of the public release's, one program per state row that walks over the tokens. Times are
taken twice: of a replayed CUDA graph (what the kernels take) and of eager calls (what launching them adds).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import report, run_benchmark
from deltamem_kernels import delta_scan, gate_projections, gated_delta_scan

RANK = 8


def main(
    tokens: Annotated[list[int], typer.Option(help="lengths T")] = [512, 2048, 8192, 32768, 131072],  # noqa: B006
    states: Annotated[list[int], typer.Option(help="states N")] = [1, 8],  # noqa: B006
    serial: Annotated[bool, typer.Option(help="also time the serial scan")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of time against T")] = None,
) -> None:
    """Microseconds of forward, and forward with backward, at batch 1 and r = 8. Needs a CUDA GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark times GPU kernels and finds no CUDA GPU")
    found = (row for n in states for t in tokens for row in _rows(t, n, serial))
    rows = report(found, "Scan, batch 1, r = 8, microseconds (median)", torch.device("cuda"), out)
    if plot:
        _plot(rows, plot)


def _rows(tokens: int, states: int, serial: bool) -> list[dict]:
    projected = torch.randn(1, tokens, 4 * states * RANK, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.full((states * RANK,), -1.5, device="cuda", requires_grad=True)
    state = torch.randn(1, states, RANK, RANK, device="cuda", requires_grad=True)
    gates = [x.detach().requires_grad_() for x in gate_projections(projected, bias, states, RANK)]
    weight = torch.randn(1, tokens, states, RANK, device="cuda")
    ways = {"triton": (lambda: gated_delta_scan(projected, bias, state), [projected, bias, state])}
    if tokens <= 8192:
        ways["torch"] = (lambda: delta_scan(*gates, state, backend="torch"), [*gates, state])
    if serial:
        from benchmarks.serial_scan import serial_scan

        ways["serial"] = (lambda: serial_scan(*gates, state), [*gates, state])
    rows = []
    for name, (scan, leaves) in ways.items():

        def forward(scan=scan):
            with torch.no_grad():
                scan()

        def both(scan=scan, leaves=leaves):
            torch.autograd.grad(scan()[0], leaves, weight, allow_unused=True)

        rows.append({
            "N": states, "T": tokens, "scan": name,
            "forward": _microseconds(forward, graph=True), "forward, eager": _microseconds(forward, graph=False),
            "forward + backward": _microseconds(both, graph=name != "torch"),
        })  # fmt: skip
    slow = rows[-1]
    for row in rows if serial else []:
        row["serial / forward"] = slow["forward"] / row["forward"]
        row["serial / both"] = slow["forward + backward"] / row["forward + backward"]
    return rows


def _microseconds(function: Callable[[], object], graph: bool, repeats: int = 15) -> float:
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, what in zip(axes, ("forward", "forward + backward"), strict=True):
        for name, n in sorted({(row["scan"], row["N"]) for row in rows}):
            line = [row for row in rows if (row["scan"], row["N"]) == (name, n)]
            axis.loglog([r["T"] for r in line], [r[what] for r in line], marker="o", label=f"{name}, N = {n}")
        axis.set(title=what, xlabel="tokens T")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("microseconds")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
