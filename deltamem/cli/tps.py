"""deltamem tps: how fast a model generates, with the adapter and without."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from deltamem.cli import loading
from deltamem.errors import DeltaMemError

EXAMPLE = "Example: deltamem tps --adapter path/to/adapter --prompt-tokens 512 --prompt-tokens 4096 --new-tokens 64"


def command(
    base: loading.BaseOption = None,
    adapter: loading.AdapterOption = None,
    model: loading.ModelOption = None,
    registry: loading.RegistryOption = None,
    prompt_tokens: Annotated[list[int], typer.Option(min=1, help="Prompt length; may be given several times.")] = [  # noqa: B006
        512
    ],
    new_tokens: Annotated[list[int], typer.Option(min=2, help="Reply length; may be given several times.")] = [64],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 3,
    output: Annotated[Path | None, typer.Option(callback=loading.home, help="Also write the figures as JSON.")] = None,
    device: loading.DeviceOption = None,
    dtype: loading.DtypeOption = "auto",
) -> None:
    """Prefill and decode speed and peak memory, of the backbone alone and with the adapter.

    Decoding is measured as generate() does it, and in slots, as chats, the server and the evaluation do.
    """
    if output is not None and not output.parent.is_dir():
        raise DeltaMemError(f"--output {output}: there is no folder {output.parent}")
    delta_model, _ = loading.load(base, adapter, model, device, dtype, registry)
    from deltamem.tools.throughput import measure

    columns = ("model", "prompt", "new", "prefill s", "prefill tok/s", "decode tok/s", "in slots", "peak GiB")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # fits 80 characters
    results = []
    for result in measure(delta_model, prompt_tokens, new_tokens, batch_size, runs):
        results.append(asdict(result))
        table.add_row(
            result.kind,
            str(result.prompt_tokens),
            str(result.new_tokens),
            f"{result.prefill_seconds:.4f}",
            f"{result.prefill_rate:,.0f}",
            f"{result.decode_rate:,.1f}",
            f"{result.slots_rate:,.1f}",
            f"{result.peak_bytes / 2**30:.2f}",
        )
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
