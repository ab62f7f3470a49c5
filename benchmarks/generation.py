"""Prefill and decode, the bare backbone beside δ-mem: `python -m benchmarks.generation --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import median_seconds, report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, known_shapes, random_backbone
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.acceleration import compile_norms_and_mlps
from deltamem.decoding.slot_decoder import SlotDecoder


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "qwen3-4b",
    strategy: Annotated[list[str], typer.Option(help="tsw, ssw or msw")] = ["tsw", "msw"],  # noqa: B006
    prefill: Annotated[list[int], typer.Option(help="prompt lengths; 0: none")] = [8192, 32768],  # noqa: B006
    context: Annotated[int, typer.Option(help="tokens before decoding")] = 4096,
    batch: Annotated[list[int], typer.Option(help="rows decoded together")] = [1, 8, 32],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="tokens decoded")] = 64,
    eager: Annotated[bool, typer.Option(help="also decode as transformers' own generate does")] = True,
    compiled: Annotated[
        bool, typer.Option(help="compile the backbone's norms and MLPs, and the layers that decode in slots")
    ] = False,
    repeats: int = 5,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Seconds of a prefill and tokens per second of decoding on random weights of a real shape."""
    place = torch.device(device)
    base = random_backbone(shape, place)
    prefill = [length for length in prefill if length]
    if compiled and (prefill or eager):
        compile_norms_and_mlps(base)
    rows, bare = [], {}
    for kind in ["backbone alone", *strategy]:
        model = base
        if kind != "backbone alone":
            model = get_delta_mem_model(base, DeltaMemConfig(strategy=kind)).requires_grad_(False).to(torch.bfloat16)
            model.eval()
        for name, value, faster in _measurements(
            model, prefill, context, batch, tokens, eager, compiled, repeats, place
        ):
            bare.setdefault(name, value)
            ratio = bare[name] / value if faster else value / bare[name]
            rows.append({"what": name, "with": kind, "value": value, "cost over backbone": ratio})
        if model is not base:
            model.unload()
    title = f"Generation on the {shape} shape{', compiled' if compiled else ''}"
    report(sorted(rows, key=lambda row: row["what"]), title, place, out)


@torch.no_grad()
def _measurements(model, prefill, context, batch, tokens, eager, compiled, repeats, place):
    vocab = model.config.vocab_size if hasattr(model.config, "vocab_size") else model.base_model.config.vocab_size
    options = {"use_cache": True, "logits_to_keep": 1}
    for length in prefill:
        ids = torch.randint(0, vocab, (1, length), device=place)
        segments = {} if model.__class__.__name__ != "DeltaMemModel" else {"segment_ids": torch.zeros_like(ids)}
        seconds = median_seconds(lambda ids=ids, s=segments: model(ids, **s, **options), place, repeats)
        yield f"prefill {length} (s)", seconds, False
    for rows in batch:
        ids = torch.randint(0, vocab, (rows, context), device=place)
        decoder = SlotDecoder(model, rows, context + (repeats + 2) * tokens, compiled=compiled)
        decoder.prefill(ids)
        yield f"first step in slots, batch {rows} (s)", median_seconds(decoder.step, place, 1, 0), False
        seconds = median_seconds(lambda d=decoder: [d.step() for _ in range(tokens)], place, repeats, 1)
        yield f"decode in slots, batch {rows} (tok/s)", rows * tokens / seconds, True
        del decoder
        if place.type == "cuda":
            torch.cuda.empty_cache()
    if eager:
        ids = torch.randint(0, vocab, (1, context), device=place)
        out = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
        memory = {"memory": out.memory} if hasattr(out, "memory") else {}

        def step(cache=out.past_key_values):
            for _ in range(8):
                model(ids[:, :1], past_key_values=cache, **memory, **options)

        yield "decode with a dynamic cache, batch 1 (tok/s)", 8 / median_seconds(step, place, repeats), True


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
