"""Every key of ``configs/``: what it may hold, how files are laid together, and what a wrong one is told."""

from pipelines.config.resolve import Cell, Config, config_hash, load_config, resolve_config
from pipelines.config.sections import Data, Generated, Train
from pipelines.config.strategies import FROZEN

__all__ = [
    "FROZEN",
    "Cell",
    "Config",
    "Data",
    "Generated",
    "Train",
    "config_hash",
    "load_config",
    "resolve_config",
]
