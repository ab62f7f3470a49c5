"""The model that an evaluation asks: a backbone, alone or with the adapter of a cell."""

from __future__ import annotations

import hashlib

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel
from deltamem.errors import DeltaMemError
from pipelines import parts
from pipelines.backbone import backbone_digest, load_backbone
from pipelines.benchmarks import Question
from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.layout import Layout


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
    digests["adapter"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    model, tokenizer = load_backbone(layout.backbone(backbone), device=device)
    if config.strategies[strategy].kind == "lora":
        from pipelines.baselines.lora import load_lora

        return load_lora(model, weights.parent), tokenizer, digests
    try:
        return DeltaMemModel.from_pretrained(model, weights.parent), tokenizer, digests
    except DeltaMemError as error:
        raise StageError(
            f"The adapter of {backbone}, {strategy}, seed {seed} can't be used: {error}. Remove "
            f"{weights.parent} and train it again."
        ) from error


def reader_and_encoder(
    model: DeltaMemModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question
) -> tuple[Reader, PromptEncoder]:
    """What runs the model and what makes its prompts; any question shows how an answer ends."""
    base, segment = model, "message"
    if isinstance(model, DeltaMemModel):
        base, segment = model.base_model, model.config.segment
    window = base.config.get_text_config(decoder=True).max_position_embeddings
    encoder = PromptEncoder(tokenizer, segment, window)
    own = base.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, encoder.answer(question)[-1]}
    ends |= set(own) if isinstance(own, list) else {own}
    return Reader(model, sorted(ends - {None}), tokenizer.pad_token_id), encoder
