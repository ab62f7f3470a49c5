"""Invented facts (``pipelines.data.generate``), told in papers, in one text, or by a user in a conversation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from deltamem.chat.format import sentence_spans
from deltamem.chat.messages import Message
from pipelines.config.data import Generated, GeneratedSource
from pipelines.data.documents import Document, Reading, Split
from pipelines.data.draw import pick
from pipelines.data.generate import FILLERS, write_papers
from pipelines.data.sources.qasper import from_files
from pipelines.run.files import file_digest

FRAMES = (
    "{}",
    "By the way, {}",
    "Please remember that {}",
    "Just so you know, {}",
    "One thing you should know: {}",
    "I heard today that {}",
)
REPLIES = ("Got it.", "Noted.", "Thanks, I'll remember that.", "Okay.", "Understood.")
SMALL_TALK = (
    ("How are you?", "I'm fine, thank you. How can I help?"),
    ("It rained all morning.", "Then let's hope for a dry afternoon."),
    ("I'm making coffee.", "Enjoy it!"),
    ("Let me think for a moment.", "Take your time."),
    ("The meeting was long.", "I hope it was worth it."),
    ("I'll be back in a minute.", "I'll be here."),
)


def load(settings: GeneratedSource, split: Split, folder: Path) -> Reading:
    """What a split tells; the papers are kept in ``papers.json``, in QASPER's official form."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "papers.json"
    write_papers(path, split, settings)
    papers = from_files([str(path)])
    documents = papers.documents
    if settings.told == "conversation":
        documents = (_conversation(paper, settings.seed) for paper in papers.documents)
    elif settings.told == "text":
        documents = map(_text, papers.documents)
    drawn = settings.model_dump(include=set(Generated.model_fields))
    origin = {"generated": drawn, "told": settings.told, "sha256": file_digest(path)}
    return Reading(documents, papers.bad_records, origin)


def _text(paper: Document) -> Document:
    """A paper's facts one after the other, and the questions for them alone."""
    message = {"role": "user", "content": " ".join(_facts(paper))}
    return replace(paper, messages=[message], exercises=paper.exercises[: len(_facts(paper))], noun="text")


def _conversation(paper: Document, seed: int) -> Document:
    """A paper's facts, each in a turn of the user's, with other turns here and there; the exercises stay."""
    draw = random.Random(f"{seed}/{paper.document_id}/told")
    messages: list[Message] = []
    for fact in _facts(paper):
        while draw.random() < 0.3:
            messages += _turn(*pick(draw, SMALL_TALK))
        frame = pick(draw, FRAMES)
        messages += _turn(frame.format(fact if frame == "{}" else fact[0].lower() + fact[1:]), pick(draw, REPLIES))
    return replace(paper, messages=messages, noun="conversation")


def _facts(paper: Document) -> list[str]:
    """The sentences that tell facts: those of the sections, without their headings and what fills them up."""
    bodies = [message["content"].split("\n", 1)[1] for message in paper.messages if "\n" in message["content"]]
    sentences = [body[start:end].strip() for body in bodies for start, end in sentence_spans(body)]
    return [sentence for sentence in sentences if sentence not in FILLERS]


def _turn(said: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
