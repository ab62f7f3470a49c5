"""One training step, write and read pass, forward and backward: `python -m benchmarks.training_step --help`.

Beside each strategy stands the frozen backbone's own forward and backward pass on the same tokens (gradients flow to
the embeddings' output), run the same way: what a training step costs that has no memory at all.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import median_seconds, peak_gib, report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, known_shapes, random_backbone
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.acceleration import compile_norms_and_mlps
from deltamem.backbone.no_cache import NoCache

BACK_ENDS = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def main(
    shape: Annotated[list[str], typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = ["qwen3-4b"],  # noqa: B006
    strategy: Annotated[list[str], typer.Option(help="tsw, ssw or msw")] = ["tsw", "ssw", "msw"],  # noqa: B006
    checkpointing: Annotated[list[str], typer.Option(help="none, selective or full")] = ["none"],  # noqa: B006
    written: Annotated[int, typer.Option(help="tokens written")] = 8192,
    read: Annotated[int, typer.Option(help="tokens read, all supervised")] = 512,
    repeats: int = 5,
    compiled: Annotated[bool, typer.Option(help="compile the backbone's norms and MLPs")] = False,
    attention: Annotated[
        list[str], typer.Option(help="SDPA's default, flash or cudnn; or transformers' flash_attention_2")
    ] = ["default"],  # noqa: B006
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Time and peak memory of a step on random weights of a real shape."""
    place = torch.device(device)
    title = f"Training step, {written} written + {read} read{', compiled' if compiled else ''}"
    rows = (
        _shape_rows(name, kernel, strategy, checkpointing, written, read, repeats, compiled, place)
        for name in shape
        for kernel in attention
    )
    report(chain.from_iterable(rows), title, place, out)


def _shape_rows(name, attention, strategy, checkpointing, written, read, repeats, compiled, place):
    base = random_backbone(name, place, "sdpa" if attention in BACK_ENDS else attention)
    if compiled:
        compile_norms_and_mlps(base)
    ids = torch.randint(0, base.config.vocab_size, (1, written + read), device=place)
    context, question = ids[:, :written], ids[:, written:]
    backend = BACK_ENDS.get(attention)
    with sdpa_kernel(backend) if backend else nullcontext():
        for mode in checkpointing:
            told = {"shape": name, "attention": attention, "checkpointing": mode}
            bare = _backbone_step(base, context, question, mode)
            row = _measure(bare, place, repeats, told | {"strategy": "backbone alone"})
            yield row | {"over backbone": 1.0}
            for kind in strategy:
                model = get_delta_mem_model(base, DeltaMemConfig(strategy=kind))
                model.memory_layers.to(torch.bfloat16)  # as DeepSpeed trains it
                step = _delta_step(model, context, question, mode)
                mine = _measure(step, place, repeats, told | {"strategy": kind})
                both = row["seconds"] and mine["seconds"]
                yield mine | {"over backbone": mine["seconds"] / row["seconds"] if both else None}
                model.unload()
                del step, model


def _measure(step, device, repeats, row):
    try:
        seconds, peak = median_seconds(step, device, repeats), peak_gib(step, device)
    except torch.OutOfMemoryError:
        seconds, peak = None, None
        torch.cuda.empty_cache()
    return {**row, "seconds": seconds, "peak GiB": peak if seconds else "out of memory"}


def _backbone_step(base, context, question, mode):
    base.gradient_checkpointing_disable()
    if mode == "full":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train(mode == "full")
    embed, trunk = base.get_input_embeddings(), base.get_decoder()

    def cache():  # spares the backbone the waits for the device that δ-mem spares itself
        return {"use_cache": False, "past_key_values": None if mode == "full" else NoCache()}

    def step():
        written = embed(context).requires_grad_()
        asked = embed(question).requires_grad_()
        hidden = trunk(inputs_embeds=written, **cache()).last_hidden_state
        loss = base(inputs_embeds=asked, labels=question, **cache()).loss
        (loss + hidden.float().mean()).backward()

    return step


def _delta_step(model, context, question, mode):
    model.train(mode != "none")
    model.base_model.gradient_checkpointing_disable()
    if mode != "none":
        model.gradient_checkpointing_enable(selective=mode == "selective")
    segments = torch.arange(context.shape[1]).div(256, rounding_mode="floor").unsqueeze(0)

    def step():
        memory = model.write(context, segment_ids=segments)
        model(question, memory=memory, write=False, labels=question, use_cache=False).loss.backward()
        for parameter in model.memory_layers.parameters():
            parameter.grad = None

    return step


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
