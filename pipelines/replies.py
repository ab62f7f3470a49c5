"""The frozen backbone's own replies to what people say, as chats to train on.

    python -m pipelines.replies --config configs/remember_chat.yaml --backbone NAME --source ordinary

For a source of the kind ``replies``. Each text is asked alone and answered greedily; the chat that comes of it is a
conversation in which facts are told (what is written), the text, and the reply. In a share of the chats there is no
conversation before, as in a chat that begins. Of a reply longer than ``max_new_tokens`` the beginning is kept, without
an end: who learns from finished replies alone learns to be brief. ``train.jsonl`` and ``eval.jsonl`` are in the form of
the kind ``chat``. An interrupted job goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipelines.benchmarks.base import Question
from pipelines.benchmarks.user_turns import user_turns
from pipelines.config import FROZEN, Config, config_hash, load_config
from pipelines.config.data import RepliesSource
from pipelines.data.conversations import conversations
from pipelines.data.documents import BadRecord, Split
from pipelines.errors import StageError, run_stage
from pipelines.evaluation.examiner import reader_and_encoder
from pipelines.evaluation.own_replies import OwnReply, by_length, own_replies
from pipelines.evaluation.records import RecordLog
from pipelines.evaluation.results import total_cost
from pipelines.run import parts
from pipelines.run.files import replacing, write_record
from pipelines.run.layout import Layout
from pipelines.run.progress import Meter
from pipelines.run.provenance import provenance
from pipelines.strategies.models import load_model

ALONE = "none"
"""The condition, in the words of an evaluation, under which a text is asked."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, highlight=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Configuration file.")],
    backbone: Annotated[str, typer.Option(help="Name of the backbone that replies.")],
    source: Annotated[str, typer.Option(help="Name of a data source of the kind replies.")],
) -> None:
    """Ask a frozen backbone for its replies to what a data source names."""
    settings = load_config(config)
    record = make_replies(settings, backbone, source)
    counted = [
        f"{split}: {found['replied']} of {found['asked']} ({found['finished']} to the end), {found['first']} of them "
        "first in their chats"
        for split, found in record["chats"].items()
    ]
    console.print(f"{Layout(settings).replies(backbone, source)}: replies, {', '.join(counted)}")


def make_replies(config: Config, backbone: str, source: str) -> dict[str, Any]:
    """Writes the chats of a source, and a record, which is returned.

    Raises StageError where there is no such source, its files can't be used, the backbone isn't prepared or finishes no
    reply, or another process is asking the same.
    """
    config.entry("backbones", backbone)
    if source not in config.data.replies:
        known = ", ".join(config.data.replies) or "none at all"
        raise StageError(f"data.sources: no entry {source!r} is of the kind replies; of that kind: {known}")
    settings, folder = config.data.replies[source], Layout(config).replies(backbone, source)
    bad: list[BadRecord] = []
    prompts = _draw(settings, bad)
    with replacing(folder) as partial:
        log = _ask(config, backbone, settings, [*prompts["eval"], *prompts["train"]], folder)
        replies = {record["question_id"]: OwnReply(record["reply"], record["finished"]) for record in log.records}
        chats = {}
        for split, asked in prompts.items():
            replied = list(_chats(settings, split, asked, replies))
            if not replied:
                raise StageError(
                    f"data.sources.{source}, {split}: {backbone} says nothing to any of {len(asked)} texts; are they "
                    "longer than its window?"
                )
            lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in replied)
            (partial / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            chats[split] = {
                "asked": len(asked),
                "replied": len(replied),
                "finished": sum(chat["finished"] for chat in replied),
                "first": sum(len(chat["messages"]) == 2 for chat in replied),
            }
        record = {
            "chats": chats,
            "bad_records": [asdict(lost) for lost in bad],
            "cost": total_cost(log.costs),
            "provenance": provenance(parts.replies(config, source)) | {"inputs": log.key},
        }
        write_record(partial / Layout(config).replies_record(backbone, source).name, record)
        log.close()
    log.path.unlink()
    return record


def _draw(settings: RepliesSource, bad: list[BadRecord]) -> dict[Split, list[str]]:
    """What is asked for each split: no text twice, and none in both."""
    texts = {text for asked in settings.asked for text in user_turns(asked, bad)}
    drawn = sorted(texts, key=lambda text: hashlib.sha256(f"{settings.seed}/{text}".encode()).digest())
    held_out, rest = drawn[: settings.eval_prompts], drawn[settings.eval_prompts :]
    if not rest:
        raise StageError(
            f"{', '.join(asked.file for asked in settings.asked)}: {len(texts)} texts in all, and eval_prompts takes "
            f"{settings.eval_prompts} of them; lower it, or name more files"
        )
    return {"train": rest[: settings.train_prompts], "eval": held_out}


def _ask(config: Config, backbone: str, settings: RepliesSource, prompts: Sequence[str], folder: Path) -> RecordLog:
    """The log of all replies: those of an earlier run, and what was still to be asked."""
    model, tokenizer, digests = load_model(config, backbone, FROZEN, 0)
    system = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
    questions = {text: Question(text, text, [*system, {"role": "user", "content": text}], ["Yes."]) for text in prompts}
    reader, encoder = reader_and_encoder(model, tokenizer, next(iter(questions.values())))
    limit, batch_size = settings.max_new_tokens, config.evaluate.batch_size
    key = {"digests": digests, "dtype": str(model.dtype), "max_new_tokens": limit, "unfinished": "kept"}
    key |= {"prompts": config_hash([settings.system_prompt, *prompts])}
    log = RecordLog(folder.with_name(f"{folder.name}.records.jsonl"), key)
    if log.records:
        console.print(f"going on after {len(log.records)} replies of an earlier run")
    encoded = {text: encoder.question(questions[text]) for text in prompts if not log.has(ALONE, text)}
    asked = {text: prompt for text, prompt in encoded.items() if len(prompt.input_ids) + limit <= encoder.window}
    with Meter(len(asked), console) as meter:
        meter.step("replies")
        for batch in by_length(asked, batch_size):
            with reader.cost("replies") as cost:
                replies = own_replies(batch, reader, encoder, limit)
            log.add(
                [
                    {"condition": ALONE, "question_id": text, "reply": reply.text, "finished": reply.finished}
                    for text, reply in replies.items()
                ],
                cost,
            )
            meter.advance(len(batch))
    return log


def _chats(
    settings: RepliesSource, split: Split, asked: Sequence[str], replies: Mapping[str, OwnReply]
) -> Iterator[dict[str, Any]]:
    """A chat for every text with a reply: facts that are told, the text, and the reply.

    Those without facts come at even distances, so that of any number of chats they are their share.
    """
    told = conversations(len(asked), settings.seed, split, (1, settings.max_facts))
    count = first = 0
    for number, (text, conversation) in enumerate(zip(asked, told, strict=True)):
        if not (reply := replies.get(text)) or not reply.text:
            continue
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        count += 1
        begins = first + 1 <= settings.first_share * count
        first += begins
        messages = turn if begins else [*conversation["messages"], *turn]
        yield {"id": f"{split}-{number}", "messages": messages, "finished": reply.finished}


if __name__ == "__main__":
    run_stage(app)
