"""Papers to episodes: `python -m pipelines.preprocess --config configs/quickstart.yaml --backbone NAME`.

Reads both splits from the source that the data section names, encodes them with the backbone's chat
template and writes shards and a manifest. The shards' bytes depend on the papers and the settings alone,
not on the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from pipelines.backbones.prepared import load_tokenizer
from pipelines.config import Config, load_config
from pipelines.data.encode import estimated_bytes, tokenizer_digest, write_split
from pipelines.data.episodes import PaperEpisodes
from pipelines.data.shards import open_episodes, write_manifest
from pipelines.data.sources import load_corpus
from pipelines.errors import run_stage
from pipelines.run import parts
from pipelines.run.files import check_free_space, replacing
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance

__all__ = ["open_episodes", "preprocess"]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="configuration, YAML or resolved JSON")],
    backbone: Annotated[str, typer.Option(help="name of the backbone whose tokenizer and chat template to use")],
) -> None:
    """Turns the papers of the data section into episodes for one backbone."""
    preprocess(load_config(config), backbone)


def preprocess(config: Config, backbone: str) -> None:
    """Writes the episodes of both splits. Raises StageError for input that can't be used."""
    config.entry("backbones", backbone)
    layout = Layout(config)
    tokenizer_folder = layout.backbone(backbone)
    tokenizer = load_tokenizer(tokenizer_folder)
    trained: set[str] = set()
    for split in ("train", "eval"):
        folder = layout.data(backbone, split)
        with replacing(folder) as partial:
            corpus = load_corpus(config.data, split, partial)
            check_free_space(partial, estimated_bytes(corpus.papers, config.data, split))
            manifest = {"backbone": backbone, "tokenizer": tokenizer_digest(tokenizer)}
            shown = functools.partial(_show, split)
            manifest |= write_split(corpus, config.data, split, tokenizer_folder, partial, shown)
            if split == "train":
                trained = {paper.paper_id for paper in corpus.papers}
            else:
                manifest["papers_also_in_train"] = sorted(trained & {p.paper_id for p in corpus.papers})
            manifest |= {"provenance": provenance(parts.preprocess(config))}
            write_manifest(partial, manifest)
        _summarise(folder, manifest)


def _show(split: str, encoded: Iterator[PaperEpisodes], papers: int) -> Iterable[PaperEpisodes]:
    return track(encoded, split, papers, console=console, disable=not console.is_terminal)


def _summarise(folder: Path, manifest: dict[str, Any]) -> None:
    dropped = sum(entry["count"] for entry in manifest["dropped"].values())
    written = manifest["tokens"]["written"]
    console.print(
        f"{folder}: {manifest['episodes']} episodes from {manifest['papers']} papers, {dropped} questions "
        f"dropped, {len(manifest['bad_records']['records'])} bad records; written tokens: median "
        f"{written['median']:.0f}, most {written['max']}",
        soft_wrap=True,
        highlight=False,
    )
    if shared := manifest.get("papers_also_in_train"):
        console.print(f"warning: {len(shared)} papers are used for training and for evaluation", style="yellow")


if __name__ == "__main__":
    run_stage(app)
