"""What the data section's sources hold out: the replies that training would learn, by source."""

from __future__ import annotations

from pathlib import Path

from pipelines.benchmarks.qasper import Qasper
from pipelines.config.benchmarks import HeldOutSettings


class HeldOut(Qasper):
    """One context per document that is written; a question's category is its source.

    Scored by answer F1, whatever the source: longer replies are better told apart by their NLL.
    """

    category = "source"

    def __init__(self, name: str, settings: HeldOutSettings, episodes: Path):
        super().__init__(name, settings, episodes)
        self.max_new_tokens = settings.max_new_tokens
