"""The adapter that a training starts from instead of a new one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltamem.adapters.locate import FILES, locate
from deltamem.errors import DeltaMemError
from pipelines.config import config_hash
from pipelines.errors import StageError
from pipelines.run.files import file_digest, replacing

if TYPE_CHECKING:
    from pipelines.training.recipe import Recipe


@dataclass(frozen=True)
class WarmStart:
    """An adapter that fits the training.

    Attributes:
        address: where the configuration says it is.
        folder: where it lies here.
        digest: sha256 (hex) over its configuration and weights.
    """

    address: str
    folder: Path
    digest: str

    @classmethod
    def find(cls, recipe: Recipe, store: str) -> WarmStart | None:
        """The adapter that the cell names; None where it names none.

        Args:
            store: MLflow store for ``models:/`` addresses.

        Raises:
            StageError: it isn't found, is damaged, or doesn't fit the strategy.
        """
        address = recipe.cell.train.init_adapter
        if address is None:
            return None
        try:
            folder = locate(address, store)
            misfits = recipe.misfits(folder)
        except (StageError, DeltaMemError) as error:
            raise StageError(f"train.init_adapter: {error}") from error
        if misfits:
            raise StageError(
                f"train.init_adapter: {address} doesn't fit strategies.{recipe.cell.strategy_name}: "
                f"{'; '.join(misfits)}. Change the strategy to match, or start from another adapter."
            )
        parts = {path.name: file_digest(path) for path in _files(folder) if path.suffix != ".md"}
        return cls(address, folder, config_hash(parts))

    def copy_to(self, folder: Path) -> Path:
        """A copy that every worker reaches: the original may lie in a cache of this machine."""
        with replacing(folder) as partial:
            for path in _files(self.folder):
                shutil.copy(path, partial / path.name)
        return folder


def _files(folder: Path) -> list[Path]:
    return [path for name in FILES if (path := folder / name).is_file()]
