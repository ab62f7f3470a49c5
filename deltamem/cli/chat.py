"""deltamem chat: talk to a model that remembers, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deltamem.cli import loading
from deltamem.errors import ChatExistsError, DeltaMemError

if TYPE_CHECKING:
    from deltamem.chat.session import ChatSession

EXAMPLE = "Example: deltamem chat --base HuggingFaceTB/SmolLM2-135M-Instruct --adapter path/to/adapter"
HELP = {
    "/help": "this list",
    "/memory": "the memory's size and norms",
    "/compare TEXT": "answers with and without the memory, side by side; changes nothing",
    "/write on|off": "whether turns are written into the memory",
    "/clear": "all turns leave the prompt and stay in the memory only",
    "/undo": "take back the last turn",
    "/reset": "forget everything",
    "/save FOLDER": "save the session",
    "/load FOLDER": "go on with a saved session",
    "/quit": "leave (also Ctrl-D); Ctrl-C takes back a reply under way",
}


def command(
    base: loading.BaseOption = None,
    adapter: loading.AdapterOption = None,
    model: loading.ModelOption = None,
    registry: loading.RegistryOption = None,
    session: Annotated[Path | None, typer.Option(callback=loading.home, help="Saved session to go on with.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of a new session.")] = None,
    window: loading.WindowOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    strength: loading.StrengthOption = 1.0,
    device: loading.DeviceOption = None,
    dtype: loading.DtypeOption = "auto",
) -> None:
    """Chat in the terminal with a model that remembers. Type /help for what else it can do."""
    if session and (system is not None or window is not None):
        raise DeltaMemError("--system and --window are for a new session; the saved one has its own")
    console = Console()
    with console.status("loading"):
        delta_model, tokenizer = loading.load(base, adapter, model, device, dtype, registry)
        from deltamem.chat.reply import TurnOptions
        from deltamem.chat.session import ChatSession

        # what is wrong with them is said now, not at the first turn
        TurnOptions(max_new_tokens, temperature, top_p, strength=strength)
        delta_model.strength = strength
        chat = (
            ChatSession.load(delta_model, tokenizer, session)
            if session
            else ChatSession(delta_model, tokenizer, system, window)
        )
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    Terminal(console, chat, options).run()


class Terminal:
    """Reads lines, answers them, obeys commands."""

    def __init__(self, console: Console, session: ChatSession, options: dict):
        self.console, self.session, self.options = console, session, options

    def run(self) -> None:
        """Until the user leaves."""
        self.console.print("[dim]/help tells the commands[/dim]")
        while True:
            try:
                line = self.console.input("[bold blue]you[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            except UnicodeDecodeError:
                self.console.print("[red]error: that line was not UTF-8[/red]")
                continue
            if line == "/quit":
                return
            if not line:
                continue
            try:
                self.command(line) if line.startswith("/") else self.answer(line)
            except (DeltaMemError, OSError) as error:
                self.console.print(Text(f"error: {error}", style="red"))
            except KeyboardInterrupt:
                self.console.print("\n[dim]interrupted; the turn is taken back[/dim]")

    def answer(self, text: str) -> None:
        """Answer a line and say what became of the turn."""
        self.console.print("[bold green]model[/] ", end="")
        for piece in self.session.stream(text, **self.options):
            self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        self.console.print()
        reply = self.session.last_reply
        assert reply is not None
        if reply.newly_forgotten:
            self.say(f"{reply.newly_forgotten} messages have left the prompt and stay in the memory only")
        if reply.finish_reason == "length":
            self.say("the reply was cut: it reached --max-new-tokens or the window's end")

    def command(self, line: str) -> None:
        """Do what a line with a slash says."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                table = Table.grid(padding=(0, 2))
                for usage, text in HELP.items():
                    table.add_row(Text(usage, style="bold"), text)
                self.console.print(table)
            case "/memory":
                self.show_memory()
            case "/compare" if argument:
                self.compare(argument)
            case "/write" if argument in ("on", "off"):
                self.session.write = argument == "on"
                self.say(f"turns are {'written' if self.session.write else 'not written'}")
            case "/clear":
                self.session.clear_prompt()
                self.say(f"{self.session.forgotten} messages are in the memory only")
            case "/undo":
                self.session.undo()
                self.say(f"taken back; the chat has {len(self.session.messages)} messages")
            case "/reset":
                self.session.reset()
                self.say("everything is forgotten (/undo takes that back)")
            case "/save" if argument:
                self.save(loading.home(argument))
            case "/load" if argument:
                runtime = self.session.runtime
                self.session = type(self.session).load(runtime.model, runtime.tokenizer, loading.home(argument))
                self.say(f"{len(self.session.messages)} messages, {self.session.forgotten} in the memory only")
            case _:
                raise DeltaMemError(f"{line!r} is not a command, or lacks its argument; /help lists them")

    def save(self, folder: str) -> None:
        """Save the session; a folder that holds another one only if the user says so."""
        try:
            self.session.save(folder, overwrite=False)
        except ChatExistsError:
            answer = self.console.input(f"{folder} holds another chat. Overwrite it? [y/N] ", markup=False)
            if answer.strip().lower() not in ("y", "yes"):
                self.say("not saved")
                return
            self.session.save(folder)
        self.say(f"saved to {folder}")

    def show_memory(self) -> None:
        """The memory's size, and its norms as bars."""
        norms = {i: float(norm.norm()) for i, norm in self.session.memory.norms().items()}
        size = sum(state.nbytes for state in self.session.memory.states.values())
        state = self.session.state
        self.say(
            f"{size:,} bytes; {len(state.tokens)} tokens in the prompt; {state.forgotten} of "
            f"{len(state.messages)} messages in the memory only. Norm of the states by layer:"
        )
        largest = max(norms.values()) or 1.0
        table = Table.grid(padding=(0, 1))
        for layer, norm in norms.items():
            table.add_row(str(layer), Text("█" * round(40 * norm / largest), style="blue"), f"{norm:.4f}")
        self.console.print(table)

    def compare(self, text: str) -> None:
        """Two answers side by side."""
        with self.console.status("answering twice"):
            answers = self.session.compare(text, **self.options)
        titles = ("with memory", "without memory")
        width = max(24, self.console.width // 2 - 1)
        panels = [Panel(Text(a.text), title=t, width=width) for t, a in zip(titles, answers, strict=True)]
        self.console.print(Columns(panels))

    def say(self, text: str) -> None:
        """A word from the program, not from the model."""
        self.console.print(Text(text, style="dim"))
