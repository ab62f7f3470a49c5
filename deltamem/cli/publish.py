"""deltamem publish: an adapter on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deltamem.cli.loading import home

EXAMPLE = "Example: deltamem publish path/to/adapter user/name --evaluation path/to/qasper.json --private"


def command(
    folder: Annotated[Path, typer.Argument(help="Adapter to publish: a folder of either format.")],
    repo: Annotated[str, typer.Argument(help="Where to: user/name, made if it isn't there.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="Result of python -m pipelines.evaluate, shown on the card; may be given several times."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(callback=home, help="The backbone's Hub id. Default: what the adapter names.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option(help="Who sees a new repository. Default: as your account has it.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", show_envvar=True, help="Default: what hf auth login has set.")
    ] = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, with a card that shows its evaluations and their controls."""
    from deltamem.adapters.publish import publish

    Console().print(publish(folder, repo, evaluation or (), base, private, token), soft_wrap=True)
