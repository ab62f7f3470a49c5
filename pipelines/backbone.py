"""Prepares a frozen backbone: one folder of safetensors weights, tokenizer and chat template, with a digest.

    python -m pipelines.backbone --config configs/quickstart.yaml --backbone smollm2-135m-instruct

The folder is written beside its place and renamed when it is complete; a complete folder with the right
digest is left as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.backbones.prepared import content_digest, load_tokenizer
from pipelines.backbones.record import RECORD, backbone_record
from pipelines.backbones.sources import fetch
from pipelines.config import config_hash, load_config
from pipelines.config.backbones import Backbone
from pipelines.errors import StageError, run_stage
from pipelines.run.files import replacing, write_record
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def prepare_backbone(name: str, spec: Backbone, folder: Path) -> dict[str, Any]:
    """Makes `folder` hold the backbone that `spec` describes and returns its record.

    The record (`backbone.json`) has name, source (the spec), digest (sha256 hex, see `content_digest`),
    revision (commit, requirement or seed) and provenance. Raises StageError when the source can't be had,
    isn't what the spec says, or isn't a causal language model with a chat template.
    """
    if _is_complete(folder, spec):
        return backbone_record(folder)
    with replacing(folder) as partial:
        return _fill(partial, name, spec)


def _is_complete(folder: Path, spec: Backbone) -> bool:
    try:
        record = backbone_record(folder)
        return record["source"] == _source(spec) and record["digest"] == _digest(folder, spec)
    except (StageError, ValueError, KeyError):  # a damaged folder is made anew
        return False


def _fill(folder: Path, name: str, spec: Backbone) -> dict[str, Any]:
    revision = fetch(spec, folder)
    load_tokenizer(folder)
    record = {
        "name": name,
        "source": _source(spec),
        "digest": _digest(folder, spec),
        "revision": revision,
        "provenance": provenance(_source(spec)),
    }
    write_record(folder / RECORD, record)
    return record


def _source(spec: Backbone) -> dict[str, Any]:
    """What of an entry decides the folder and how it is loaded: all but what it changes of training."""
    return spec.model_dump(mode="json", exclude={"train"})


def _digest(folder: Path, spec: Backbone) -> str:
    """Of the files; of a backbone that is quantised when it is loaded, of how, too."""
    files = content_digest(folder)
    return config_hash([files, spec.quantization]) if spec.quantization else files


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Configuration file.")],
    backbone: Annotated[str, typer.Option(help="Name of one of its backbones.")],
) -> None:
    """Prepare one frozen backbone of a configuration."""
    settings = load_config(config)
    folder = Layout(settings).backbone(backbone)
    record = prepare_backbone(backbone, settings.entry("backbones", backbone), folder)
    typer.echo(f"backbone {backbone}: {folder} (sha256 {record['digest'][:12]})")


if __name__ == "__main__":
    run_stage(app)
