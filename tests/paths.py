"""Where the checkout is, and the data that may lie beside it."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
DATA = PROJECT.parent / "shared" / "data"
"""Real data sets; tests that want one are skipped where it is missing."""
