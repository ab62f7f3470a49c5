"""The sources of data: one module per kind, which reads its files into documents and exercises."""

from __future__ import annotations

import importlib
from pathlib import Path

from pipelines.config.data import DataSource
from pipelines.data.documents import Corpus, Split, read_whole, with_system_prompt


def load_corpus(settings: DataSource, split: Split, folder: Path) -> Corpus:
    """A source's documents of one split, every document and question under an id of its own.

    Args:
        folder: where a source that makes its data may keep it.

    Raises:
        StageError: a file isn't what the kind expects, or the Hub can't be reached.
    """
    source = importlib.import_module(f"pipelines.data.sources.{settings.kind}")
    return read_whole(with_system_prompt(source.load(settings, split, folder), settings.system_prompt))
