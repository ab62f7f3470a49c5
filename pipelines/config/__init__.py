"""Every key of ``configs/``: what it may hold, how files are laid together, and what a wrong one is told."""

from pipelines.config.data import Data, Generated
from pipelines.config.resolve import Cell, Config, config_hash, load_config, resolve_config
from pipelines.config.sections import Train
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
