"""deltamem serve: the OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from deltamem.chat.prompt_parts import PART_TOKENS
from deltamem.cli import loading
from deltamem.errors import DeltaMemError

if TYPE_CHECKING:
    from deltamem.chat.runtime import ChatRuntime
    from deltamem.server.serving import StartEngine

EXAMPLE = """Example: deltamem serve --model models:/NAME@champion --registry sqlite:///results/mlflow.db

Then: curl localhost:8000/v1/chat/completions -H "Content-Type: application/json"
-d '{"model": "NAME", "session_id": "ada", "messages": [{"role": "user", "content": "I am Ada."}]}'"""


def command(
    base: loading.BaseOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter: a folder (also of the public release), a Hub id, or models:/NAME@ALIAS; NAME=ADAPTER says "
            "what clients call it. With --engine vllm it may be repeated, for several on one backbone."
        ),
    ] = None,
    model: loading.ModelOption = None,
    registry: loading.RegistryOption = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the adapter's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DELTAMEM_API_KEY", help="Key that clients must send.", show_envvar=True),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a web page that may call the server, e.g. https://chat.example; may be repeated."),
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="What clients with a session send where they don't say: whole (all messages, as most front ends do: "
            "what changes the past is refused) or new. Default: told from the messages."
        ),
    ] = None,
    store: Annotated[Path, typer.Option(callback=loading.home, help="Folder of the kept sessions.")] = Path(
        "deltamem-sessions"
    ),
    window: loading.WindowOption = None,
    part_tokens: Annotated[
        int,
        typer.Option(min=1, help="Longer prompts are read in parts of this length, between other replies' tokens."),
    ] = PART_TOKENS,
    batch_size: Annotated[int, typer.Option(min=1, help="Turns in progress at once, decoded together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Turns that may wait; more are refused.")] = 256,
    max_reply_tokens: Annotated[int, typer.Option(min=1, help="Longest reply a client may ask for.")] = 4096,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Longest request body, in MiB.")] = 4,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions kept.")] = 10_000,
    max_store_gb: Annotated[float, typer.Option(min=0, help="Disk for kept sessions, in GiB.")] = 64,
    max_held_gb: Annotated[float, typer.Option(min=0, help="Memory for sessions used lately, in GiB.")] = 2,
    max_age_days: Annotated[float, typer.Option(min=0, help="Sessions unused for longer are removed.")] = 30,
    strength: loading.StrengthOption = 1.0,
    device: loading.DeviceOption = None,
    dtype: loading.DtypeOption = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile what decodes, for speed on a GPU; the first replies wait for it, up to a minute."
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="What computes the replies: vllm, in an environment that has it. Default: this library."),
    ] = None,
    engine_settings: Annotated[
        str | None,
        typer.Option(help='The engine\'s own settings as JSON, e.g. {"gpu_memory_utilization": 0.8}.'),
    ] = None,
) -> None:
    """Serve chats that remember, at /v1/chat/completions as OpenAI does, with a page to try it at /.

    A request that names a session (field session_id, or header X-Session-Id) goes on where that session was,
    with its memory; one that doesn't stands alone. Sessions are on disk before a reply's end is told.
    """
    try:
        from deltamem.server.app import create_app
        from deltamem.server.limits import RequestLimits
        from deltamem.server.run import bind, check_reach, make_server
        from deltamem.server.serving import ServerSettings
        from deltamem.server.store import StoreLimits
    except ImportError as error:
        raise DeltaMemError(f"the server needs a package that isn't installed ({error.name})") from error
    from deltamem.backbone.calls import checked_strength
    from deltamem.chat.runtime import ChatRuntime

    if history not in (None, "whole", "new"):
        raise DeltaMemError(f"--history {history}: choose whole or new")
    origins = tuple(allow_origin or ())
    check_reach(host, api_key, origins)
    place = bind(host, port)
    loading.check_dtype(dtype)
    served, strength, start = _served(base, adapter or [], model, registry, name), checked_strength(strength), None
    if engine is None:
        if engine_settings is not None:
            raise DeltaMemError("--engine-settings are for another engine: name it with --engine")
        if len(served) > 1:
            raise DeltaMemError("several adapters need --engine vllm; without it, start one server for each")
        ((name, named),) = served.items()
        delta_model, tokenizer = loading.load_named(named, device, dtype)
        delta_model.strength = strength
        runtimes = {name: ChatRuntime(delta_model, tokenizer, window, part_tokens, compiled)}
    else:
        if compiled:
            raise DeltaMemError(f"--compile is for this library's own decoding; --engine {engine} has ways of its own")
        runtimes, start = _engine(engine)(served, window, dtype, strength, _json_object(engine_settings))
    settings = ServerSettings(
        store=store,
        api_key=api_key,
        most_together=batch_size,
        most_waiting=max_waiting,
        history=history,
        origins=origins,
        requests=RequestLimits(int(max_body_mb * 2**20), reply_tokens=max_reply_tokens),
        kept=StoreLimits(max_sessions, int(max_store_gb * 2**30), int(max_held_gb * 2**30), max_age_days * 86_400),
    )
    app = create_app(runtimes, settings, start)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    Console().print(f"serving {', '.join(runtimes)} at {address} (sessions in {store})", soft_wrap=True)
    make_server(app, host, port).run([place])


def _served(
    base: str | None, adapters: list[str], model: str | None, registry: str | None, name: str | None
) -> dict[str, loading.Named]:
    """What clients call each adapter, and where it is."""
    served: dict[str, loading.Named] = {}
    for text in adapters or [None]:
        called, place = (None, None) if text is None else _split(text)
        named = loading.find(base, place, model, registry)
        called = called or _model_name(model or place or "")
        if called in served:
            raise DeltaMemError(f"two adapters are called {called}: name one of them, --adapter NAME={place}")
        served[called] = named
    if len({(named.base, named.revision) for named in served.values()}) > 1:
        made = ", ".join(f"{called} for {named.base}" for called, named in served.items())
        raise DeltaMemError(f"the adapters were made for several backbones ({made}): name the one to use with --base")
    if name is not None and len(served) > 1:
        raise DeltaMemError("--name is for one adapter; of several, say --adapter NAME=ADAPTER")
    return served if name is None else dict.fromkeys([name], *served.values())


def _split(adapter: str) -> tuple[str | None, str]:
    """NAME=ADAPTER → both; a folder may have an equals sign in its own name."""
    name, sign, place = adapter.partition("=")
    if not sign or "/" in name or Path(loading.home(adapter)).exists():
        return None, loading.home(adapter)
    return name, loading.home(place)


def _engine(name: str) -> Callable[..., tuple[dict[str, ChatRuntime], StartEngine]]:
    """What starts an engine that another package brings."""
    found = {point.name: point for point in entry_points(group="deltamem.engines")}
    if name not in found:
        raise DeltaMemError(f"--engine {name}: there is no such engine; there are {', '.join(found) or 'none'}")
    try:
        return found[name].load()
    except ImportError as error:
        raise DeltaMemError(
            f"--engine {name} needs a package that isn't installed ({error.name}); docs/{name}.md says how to make an "
            "environment that has it"
        ) from error


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise DeltaMemError(f"--engine-settings isn't JSON: {error}") from error
    if not isinstance(values, dict):
        raise DeltaMemError('--engine-settings must be an object, such as {"max_num_seqs": 64}')
    return values


def _model_name(adapter: str) -> str:
    """models:/NAME@ALIAS and models:/NAME/VERSION give NAME, a folder or Hub id its last part."""
    if adapter.startswith("models:/"):
        return adapter.removeprefix("models:/").split("@")[0].split("/")[0]
    return Path(adapter).resolve().name if Path(adapter).exists() else adapter.rsplit("/", 1)[-1]
