"""What is in an adapter, a memory or a saved session: sizes, norms and gates per layer, and a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
from deltamem.adapters.names import INPUTS, NORM_LIMIT, parameter_count, tensor_name
from deltamem.chat import session_files
from deltamem.config import HEADS
from deltamem.errors import DeltaMemError
from deltamem.memory import DeltaMemory


@dataclass(frozen=True)
class Inspection:
    """Facts about one thing.

    Attributes:
        title: what it is.
        facts: {name: value} about the whole.
        columns: names of the per-layer columns, the first being "layer".
        rows: one per layer.
        tiles: {layer: [rows, columns]} what the picture shows.
        picture: what the picture's colours mean.
    """

    title: str
    facts: dict[str, str]
    columns: list[str]
    rows: list[list[str]]
    tiles: dict[int, Tensor]
    picture: str


def inspect(path: str) -> Inspection:
    """Look at an adapter (folder, Hub id or models:/ address), a saved session's folder or a memory file.

    Raises:
        DeltaMemError: it is none of them.
    """
    place = Path(path)
    if place.is_file():
        return inspect_memory(DeltaMemory.load(place), f"memory {path}", {})
    if (place / session_files.MANIFEST).is_file():
        return _inspect_session(place)
    return _inspect_adapter(path)


def inspect_memory(memory: DeltaMemory, title: str, facts: dict[str, str]) -> Inspection:
    """Norms of every layer's states."""
    states = {i: state.float().cpu() for i, state in memory.states.items()}
    batch, count, rank, _ = next(iter(states.values())).shape
    size = sum(state.nbytes for state in memory.states.values())
    facts |= {
        "memory": f"{len(states)} layers × {count} states of {rank}×{rank}"
        + (f" × {batch} sequences" if batch > 1 else "") + f", {size:,} bytes"
    }  # fmt: skip
    rows = []
    for i, state in states.items():
        singular = torch.linalg.svdvals(state.flatten(0, 1))
        # participation ratio: 1 when one direction holds everything, r when all are alike
        spread = (singular.sum(-1) ** 2 / singular.square().sum(-1).clamp_min(1e-30)).mean()
        norms = state.flatten(2).norm(dim=-1)
        rows.append([str(i), f"{norms.mean():.4f}", f"{norms.max():.4f}", f"{state.abs().max():.4f}", f"{spread:.2f}"])
    tiles = {i: torch.cat(list(state[0]), dim=1) for i, state in states.items()}
    columns = ["layer", "norm", "largest norm", "largest entry", "directions in use"]
    return Inspection(title, facts, columns, rows, tiles, "entries of the states (rows: values, columns: keys)")


def with_ratios(inspection: Inspection, ratios: dict[int, dict[str, float]]) -> Inspection:
    """An adapter's inspection with a column ‖Δ‖/‖·‖ for each head that it steers.

    Args:
        ratios: of :func:`deltamem.tools.steering_ratios.steering_ratios`.
    """
    heads = list(next(iter(ratios.values())))
    rows = [[*row, *(f"{ratios[int(row[0])][head]:.4f}" for head in heads)] for row in inspection.rows]
    return replace(inspection, columns=[*inspection.columns, *(f"‖Δ{head}‖/‖{head}‖" for head in heads)], rows=rows)


def save_picture(inspection: Inspection, path: str | Path) -> None:
    """Draw the layers' tiles as one heat map, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = list(inspection.tiles)
    columns = min(6, len(layers))
    lines = -(-len(layers) // columns)
    values = torch.cat([tile.flatten() for tile in inspection.tiles.values()])
    low, high = float(values.min()), float(values.max())
    limit = max(-low, high) or 1.0
    colours = {"cmap": "viridis", "vmin": low, "vmax": high}
    if low < 0:  # with white at zero
        colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    shape = inspection.tiles[layers[0]].shape
    width, height = 2.0, max(0.5, min(2.0, 2.0 * shape[0] / shape[1]))
    size = (columns * width + 1.4, lines * (height + 0.25) + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, layer in zip(axes.flat, layers, strict=False):
        image = axis.imshow(inspection.tiles[layer].numpy(), aspect="auto", **colours)
        axis.set_title(f"layer {layer}", fontsize=8, pad=2)
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(inspection.picture, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _inspect_session(folder: Path) -> Inspection:
    manifest = session_files.read_manifest(folder)
    roles = [message["role"] for message in manifest["messages"]]
    system = int(roles[:1] == ["system"])
    facts = {
        "messages": f"{len(roles)}, of which {max(manifest['start'] - system, 0)} are in the memory only",
        "prompt": f"{len(manifest['tokens'])} tokens",
        "size on disk": f"{sum(path.stat().st_size for path in folder.iterdir()):,} bytes",
        "adapter sha256": manifest["adapter_digest"][:16],
        "backbone sha256": manifest["backbone_digest"][:16],
    }
    memory = DeltaMemory.load(session_files.memory_file(folder))
    return inspect_memory(memory, f"session {folder}", facts)


def _inspect_adapter(path: str) -> Inspection:
    config, tensors = load_adapter(locate(path))
    layers = sorted({int(name.split(".")[2]) for name in tensors})
    heads = [head for head in HEADS if head in config.steer]
    columns = ["layer", "‖W_q‖", "‖W_k‖", "‖W_v‖", "‖W_β‖", "gate σ(b)", "least", "most"]
    columns += [f"‖Δ_{head}‖" for head in heads] + ["state limit"] * config.limit_norms
    rows, tiles = [], {}
    for i in layers:

        def get(name: str, layer: int = i) -> Tensor:
            full = tensor_name(layer, name)
            if full not in tensors:
                raise DeltaMemError(f"{path}: tensor {full} is missing")
            return tensors[full].float()

        gate = torch.sigmoid(get("beta_bias"))
        norms = [_four_digits(get(name).norm()) for name in INPUTS]
        steering = [_four_digits(get(f"delta_{head}_proj").norm()) for head in heads]
        gates = [f"{float(value):.4f}" for value in (gate.mean(), gate.min(), gate.max())]
        limits = [_four_digits(get(NORM_LIMIT).max())] if config.limit_norms else []
        rows.append([str(i), *norms, *gates, *steering, *limits])
        tiles[i] = gate.view(config.states, config.rank)
    facts = {
        "strategy": config.strategy.upper() + (f" per {config.segment}" if config.strategy == "ssw" else ""),
        "memory": f"{len(layers)} layers × {config.num_states} states of {config.rank}×{config.rank}",
        "steers": ", ".join(config.steer) + f", α = {config.alpha:g}",
        "parameters": f"{parameter_count(tensors):,}",
        "size": f"{sum(t.nbytes for t in tensors.values()):,} bytes ({_dtypes(tensors)})",
        "backbone": str(config.base_model_name_or_path or "unknown"),
    }
    picture = "write gates σ(b) at zero input (rows: states, columns: channels)"
    return Inspection(f"adapter {path}", facts, columns, rows, tiles, picture)


def _four_digits(value: Tensor) -> str:
    """With as many decimals as leave a table of thirteen columns within 80 characters."""
    return f"{float(value):.{max(0, 4 - len(str(int(value))))}f}"


def _dtypes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
