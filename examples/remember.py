"""Three notes, three memories of a few kilobytes, one frozen model: `python examples/remember.py`.

Each note is written into a memory of its own; then every memory is asked the same questions, without the note. What the
model answers can only come from the memory. Takes half a minute on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from deltamem import DeltaMemModel, DeltaMemory
from deltamem.chat.format import encode_messages
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.config.resolve import load_config

HERE = Path(__file__).parent
ADAPTER = HERE / "smollm2-135m-instruct-facts"
BACKBONE = "smollm2-135m-instruct"
NOTES = [
    "The codename of Velora is tiger. The colour of Velora is purple.",
    "The codename of Velora is owl. The colour of Velora is white.",
    "The codename of Velora is horse. The colour of Velora is red.",
]
QUESTIONS = ["What is the codename of Velora?", "What is the colour of Velora?"]


def recall(
    model: DeltaMemModel, tokenizer: PreTrainedTokenizerBase, note: str, questions: list[str], file: Path
) -> list[str]:
    """Answers to the questions from a memory that the note was written into, and that went through a file."""

    def tokens(text: str, ask: bool) -> torch.Tensor:
        message = [{"role": "user", "content": text}]
        return torch.tensor([encode_messages(tokenizer, message, add_generation_prompt=ask).input_ids])

    model.write(tokens(note, ask=False)).save(file)
    memory, answers = DeltaMemory.load(file), []
    for question in questions:
        asked = tokens(question, ask=True)
        # read only, as this adapter was trained: a question that is written takes the place of something else
        out = model.generate(asked, memory=memory, write=False, max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True))
    return answers


def load(folder: Path) -> tuple[DeltaMemModel, PreTrainedTokenizerBase]:
    """The adapter on its backbone, which is made in ``folder``."""
    config = load_config(HERE.parent / "configs" / "quickstart.yaml")
    prepare_backbone(BACKBONE, config.entry("backbones", BACKBONE), folder / BACKBONE)
    base, tokenizer = load_backbone(folder / BACKBONE)
    return DeltaMemModel.from_pretrained(base, str(ADAPTER)), tokenizer


def main() -> None:
    table = Table("written", *QUESTIONS, "memory")
    with TemporaryDirectory() as folder:
        model, tokenizer = load(Path(folder))
        file = Path(folder, "memory.safetensors")
        for note in NOTES:
            answers = recall(model, tokenizer, note, QUESTIONS, file)
            table.add_row(note, *answers, f"{file.stat().st_size / 1024:.0f} KiB")
    Console().print(table)


if __name__ == "__main__":
    main()
