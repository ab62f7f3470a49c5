"""Registered adapters as MLflow pyfunc models.

    model = mlflow.pyfunc.load_model("models:/deltamem-BACKBONE-STRATEGY@champion")
    reply = model.predict([{"role": "user", "content": "…"}])

The registered folder holds the adapter and the place of its backbone, never the backbone's weights. Where the
backbone lies elsewhere: ``load_model(uri, model_config={"backbone": FOLDER})``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import StageError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
Message = dict[str, str]


def write_model_folder(adapter: Path, backbone: Path, digest: str, target: Path) -> None:
    """Writes to ``target`` the adapter's files and an MLmodel file naming this module and the backbone."""
    import mlflow.pyfunc
    from mlflow.models import Model

    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copy(adapter / name, target / name)
    model = Model()
    mlflow.pyfunc.add_to_model(
        model,
        loader_module=__name__,
        model_config={"backbone": str(backbone.resolve()), "backbone_digest": digest, "max_new_tokens": 256},
    )
    model.save(str(target / "MLmodel"))


class ChatModel:
    """Answers chats. Every call starts from an empty memory and writes the messages as it reads them."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def predict(self, model_input: Sequence[Message], params: dict[str, Any] | None = None) -> str:
        """The greedy reply to ``[{"role": …, "content": …}, …]``; params may set max_new_tokens."""
        import torch

        from deltamem import encode_messages

        messages = _messages(model_input)
        encoded = encode_messages(
            self.tokenizer, messages, add_generation_prompt=True, segment=self.model.config.segment
        )
        device = next(self.model.parameters()).device
        ids = torch.tensor([encoded.input_ids], device=device)
        with torch.no_grad():
            out = self.model.generate(
                ids,
                segment_ids=torch.tensor([encoded.segment_ids], device=device),
                do_sample=False,
                max_new_tokens=int((params or {}).get("max_new_tokens", self.max_new_tokens)),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> ChatModel:
    """Called by MLflow with the registered folder."""
    import torch

    from deltamem import DeltaMemModel
    from pipelines.backbone import backbone_digest, load_backbone

    folder = Path(model_config["backbone"])
    if not folder.is_dir():
        raise StageError(
            f"{path}: its backbone is not at {folder}. Make it with `python -m pipelines.backbone` and pass "
            'its folder: load_model(uri, model_config={"backbone": FOLDER}).'
        )
    if (found := backbone_digest(folder)) != model_config["backbone_digest"]:
        raise StageError(
            f"{path}: the adapter was trained on the backbone with digest "
            f"{model_config['backbone_digest'][:12]}, {folder} holds {found[:12]}."
        )
    backbone, tokenizer = load_backbone(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    model = DeltaMemModel.from_pretrained(backbone, path)
    return ChatModel(model.eval(), tokenizer, model_config["max_new_tokens"])


def _messages(model_input: Any) -> list[Message]:
    wrong = StageError(
        'expected chat messages: [{"role": "user", "content": "…"}, …], roles and contents as text'
    )
    if not isinstance(model_input, Sequence) or isinstance(model_input, str) or not model_input:
        raise wrong
    for message in model_input:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise wrong
    return list(model_input)
