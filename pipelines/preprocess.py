"""Documents to episodes: `python -m pipelines.preprocess --config configs/quickstart.yaml --backbone NAME`.

Reads both splits from the sources that the data section names, encodes them with the backbone's chat
template and writes shards and a manifest. The shards' bytes depend on the documents and the settings alone,
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
from pipelines.data.documents import Corpus, Split
from pipelines.data.encode import Encoders, estimated_bytes, tokenizer_digest, write_split
from pipelines.data.episodes import Episodes
from pipelines.data.shards import open_episodes, write_manifest
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError, run_stage
from pipelines.run import parts
from pipelines.run.files import check_free_space, read_record, replacing, run_first
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance

__all__ = ["open_episodes", "preprocess"]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Configuration file.")],
    backbone: Annotated[str, typer.Option(help="Name of one of its backbones: whose tokens.")],
) -> None:
    """Turn what the data section names into episodes for one backbone."""
    preprocess(load_config(config), backbone)


def preprocess(config: Config, backbone: str) -> None:
    """Writes the episodes of both splits. Raises StageError for input that can't be used."""
    config.entry("backbones", backbone)
    layout = Layout(config)
    tokenizer_folder = layout.backbone(backbone)
    tokenizer = load_tokenizer(tokenizer_folder)
    with Encoders(config.data, tokenizer_folder) as encoders:
        trained: set[str] = set()
        for split in ("train", "eval"):
            folder = layout.data(backbone, split)
            with replacing(folder) as partial:
                corpora = _load(config, backbone, split, partial)
                needed = sum(estimated_bytes(corpus.documents, config.data, split) for corpus in corpora.values())
                check_free_space(partial, needed)
                manifest: dict[str, Any] = {"backbone": backbone, "tokenizer": tokenizer_digest(tokenizer)}
                shown = functools.partial(_show, split)
                manifest |= write_split(corpora, config.data, split, encoders, partial, shown)
                found = _ids(config, corpora)
                if split == "train":
                    trained = found
                else:
                    manifest["papers_also_in_train"] = sorted(trained & found)
                manifest |= {"provenance": provenance(parts.preprocess(config))}
                write_manifest(partial, manifest)
            _summarise(folder, manifest)


def _load(config: Config, backbone: str, split: Split, folder: Path) -> dict[str, Corpus]:
    """The documents of every source, by its name."""
    corpora, layout = {}, Layout(config)
    for name, settings in config.data.named_sources.items():
        try:
            if settings.kind == "replies":
                read_record(layout.replies_record(backbone, name), run_first("replies"))
                settings = settings.as_chat(layout.replies(backbone, name))
            corpora[name] = load_corpus(settings, split, folder if config.data.source else folder / name)
        except StageError as error:
            if config.data.source:
                raise
            raise StageError(f"data.sources.{name}: {error}") from error
    return corpora


def _ids(config: Config, corpora: dict[str, Corpus]) -> set[str]:
    """The ids of all documents, as they stand in the shards."""
    prefixes = {name: "" if config.data.source else f"{name}/" for name in corpora}
    return {prefixes[name] + document.document_id for name in corpora for document in corpora[name].documents}


def _show(split: str, encoded: Iterator[Episodes], documents: int) -> Iterable[Episodes]:
    return track(encoded, split, documents, console=console, disable=not console.is_terminal)


def _summarise(folder: Path, manifest: dict[str, Any]) -> None:
    for name, part in manifest.get("sources", {"": manifest}).items():
        dropped = sum(entry["count"] for entry in part["dropped"].values())
        written = part["tokens"]["written"]
        console.print(
            f"{folder}{name and f', {name}'}: {part['episodes']} episodes from {part['papers']} papers, {dropped} "
            f"questions dropped, {len(part['bad_records']['records'])} bad records; written tokens: median "
            f"{written['median']:.0f}, most {written['max']}",
            soft_wrap=True,
            highlight=False,
        )
    if shared := manifest.get("papers_also_in_train"):
        console.print(f"warning: {len(shared)} papers are used for training and for evaluation", style="yellow")


if __name__ == "__main__":
    run_stage(app)
