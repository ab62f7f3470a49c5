"""The command line: deltamem chat | serve | inspect | convert | average | publish | tps."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from deltamem.cli import average, chat, convert, inspect, publish, serve, tps
from deltamem.errors import DeltaMemError

app = typer.Typer(
    help="Use δ-mem adapters: chats that remember, a server for them, and a look inside.\n\n"
    "An adapter is named by its folder (this project's or the public release's format), a Hub id, or its place in an "
    "MLflow registry, models:/NAME@ALIAS. It belongs to one backbone, the frozen model it was trained on, which it "
    "names itself unless --base does.",
    epilog="deltamem COMMAND --help tells a command's options, with an example.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (chat, serve, inspect, convert, average, publish, tps):
    app.command(module.__name__.rpartition(".")[2], epilog=module.EXAMPLE)(module.command)


def main() -> None:
    """Run the command line; an error that its user can act on is told in a sentence, without a traceback."""
    try:
        app()
    except (DeltaMemError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:  # no file that the user could have named
            raise
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, soft_wrap=True).print(message)
        sys.exit(1)
