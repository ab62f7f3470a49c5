"""A run on generated papers and a tiny backbone, up to its episodes."""

from pathlib import Path
from typing import Any

from pipelines.config import Config, resolve_config
from pipelines.preprocess import preprocess
from pipelines.run.layout import Layout


def prepare_run(folder: Path, backbone: Path, eval_papers: int, **settings: Any) -> Config:
    """The configuration of a run in ``folder`` whose stages backbone and preprocess are done."""
    generated = {"train_papers": 1, "eval_papers": eval_papers, "facts_per_paper": 1}
    whole = {
        "name": "run",
        "results_dir": str(folder),
        "backbones": ["tiny-random"],
        "strategies": ["tsw"],
        "benchmarks": ["qasper"],
        "data": {"source": "generated", "generated": generated, "processes": 1},
        "evaluate": {"use_gpu": False, "max_new_tokens": 4, "bootstrap_samples": 100},
        **settings,
    }
    config = resolve_config(whole, "test")
    place = Layout(config).backbone("tiny-random")
    place.parent.mkdir(parents=True)
    place.symlink_to(backbone)
    preprocess(config, "tiny-random")
    return config
