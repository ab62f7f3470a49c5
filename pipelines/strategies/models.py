"""The model of a cell as it is evaluated: its backbone, and its adapter if it was trained."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel
from deltamem.errors import DeltaMemError
from pipelines.backbones.prepared import load_backbone
from pipelines.backbones.record import backbone_digest
from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.run import parts
from pipelines.run.files import file_digest
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import load_adapter


def load_model(
    config: Config, backbone: str, strategy: str, seed: int
) -> tuple[DeltaMemModel | PreTrainedModel, PreTrainedTokenizerBase, dict[str, str | None]]:
    """The model, its tokenizer, and the digests of what it was loaded from.

    Raises:
        StageError: backbone or adapter are missing or damaged.
    """
    layout = Layout(config)
    config.entry("backbones", backbone)
    digests: dict[str, str | None] = {"backbone": backbone_digest(layout.backbone(backbone)), "adapter": None}
    device = "cuda" if config.evaluate.use_gpu else "cpu"
    if not parts.needs_adapter(config, strategy):
        return *load_backbone(layout.backbone(backbone), device=device), digests
    config.cell(backbone, strategy, seed)
    weights = layout.adapter_weights(backbone, strategy, seed)
    if not weights.is_file():
        raise StageError(
            f"{weights.parent}: no adapter to evaluate ({weights.name} is missing). Run `python -m "
            f"pipelines.train` for {backbone}, {strategy}, seed {seed} first."
        )
    digests["adapter"] = file_digest(weights)
    model, tokenizer = load_backbone(layout.backbone(backbone), device=device)
    try:
        return load_adapter(config.strategies[strategy].kind, model, weights.parent), tokenizer, digests
    except DeltaMemError as error:
        raise StageError(
            f"The adapter of {backbone}, {strategy}, seed {seed} can't be used: {error}. Remove "
            f"{weights.parent} and train it again."
        ) from error
