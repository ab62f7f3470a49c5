"""Making the frozen backbone itself faster or smaller, which is where nearly all of a training step's time goes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import PreTrainedModel

from deltamem.backbone.decoder import find_decoder

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def compile_norms_and_mlps(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Compile the backbone's norms and MLPs in place; returns the model.

    Written out in PyTorch, each RMSNorm and each gated MLP runs as half a dozen kernels and keeps as many float32
    intermediates for its backward pass. Compiled, they are one or two kernels that keep their inputs. Attention and its
    projections, where a memory is read and written, stay as they are.

    Args:
        **options: of ``torch.compile``. Shapes are dynamic unless these say otherwise: batches differ in length.
    """
    options = {"dynamic": True, **options}
    compiled: set[int] = set()
    for layer in find_decoder(model).layers:
        for name, module in layer.module.named_modules():
            inside = any(id(parent) in compiled for parent in _parents(layer.module, name))
            if not inside and (name == "mlp" or type(module).__name__.endswith("RMSNorm")):
                module.compile(**options)
                compiled.add(id(module))
    return model


def _parents(root: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")[:-1]
    return [root.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]


def keep_products(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing: keep matrix products and attention, recompute the cheap rest."""
    name = operator.name().split("::")[-1].split(".")[0]
    keep = name in _PRODUCTS or "attention" in name or "flash" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
