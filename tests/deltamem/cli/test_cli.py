"""The command line, as its users call it."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from rich.console import Console
from typer.testing import CliRunner

from deltamem import ChatSession, DeltaMemModel
from deltamem.adapters.files import load_adapter
from deltamem.cli import app, main
from deltamem.tools.inspection import inspect, save_picture
from pipelines.registry.model_folder import write_model_folder
from tests.full_disk import full_disk
from tests.tiny_models import make_chat_model

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A backbone with its tokenizer, an adapter, and a session saved with both."""
    root = tmp_path_factory.mktemp("model")
    model, tokenizer = make_chat_model("msw")
    model.base_model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model.config.base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "adapter")
    chat = ChatSession(model, tokenizer)
    chat.send("hello", max_new_tokens=4)
    chat.save(root / "session")
    return root


def deltamem(*arguments, input=None, columns=160):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=input, env={"COLUMNS": str(columns)})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_help_names_every_command_and_option():
    text = deltamem("--help")
    for name in ("chat", "serve", "inspect", "convert", "average", "publish", "tps"):
        assert name in text
        usage = deltamem(name, "--help")
        assert "--help" in usage and f"Example: deltamem {name} " in usage


def chat(folders, *lines, options=()):
    where = ["--base", folders / "base", "--adapter", folders / "adapter", "--device", "cpu"]
    return deltamem("chat", *where, "--max-new-tokens", 6, *options, input="\n".join(lines) + "\n")


def test_chat_answers_and_obeys(folders, tmp_path):
    saved = tmp_path / "chat"
    text = chat(
        folders, "hello", "/memory", "/compare who?", "/write off", "again", "/write on", f"/save {saved}",
        "/undo", "/clear", "/reset", f"/load {saved}", "/help", "/nonsense", "/write maybe",
        f"/load {tmp_path}/no", f"/save {folders}/base/config.json", "/quit", "never read",
    )  # fmt: skip
    for expected in (
        "3,072 bytes", "with memory", "without memory", "turns are not written", f"saved to {saved}",
        "the chat has 2 messages", "2 messages are in the memory only", "everything is forgotten",
        "4 messages, 0 in the memory only", "side by side", "'/nonsense' is not a command",
        "'/write maybe' is not a command", "holds no saved session", "File exists",
    ):  # fmt: skip
        assert expected in text.replace("\n", " "), expected
    restored = ChatSession.load(*make_chat_model("msw"), saved)
    assert [m["content"] for m in restored.messages if m["role"] == "user"] == ["hello", "again"]
    reference = ChatSession(*make_chat_model("msw"))
    reference.send("hello", max_new_tokens=6)
    torch.testing.assert_close(dict(restored.memory.states), dict(reference.memory.states))


def test_without_strength_the_chat_is_the_frozen_models(folders):
    line = "/compare what is it?"
    panels = [
        re.findall(r"│ (.*?) +│ *│ (.*?) +│", chat(folders, "a secret", "/clear", line, options=o))
        for o in ([], ["--strength", 0])
    ]
    assert all(left == right for left, right in panels[1]) and any(left != right for left, right in panels[0])


def test_a_tilde_is_the_users_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chat(folders, "hello", "/save ~/mine", "/load ~/mine")
    assert (tmp_path / "mine" / "session.json").is_file() and not (tmp_path / "~").exists()
    assert "2 messages" in chat(folders, "/load ~/mine", options=["--session=~/mine"])


def test_saving_over_another_chat_asks_first(folders, tmp_path):
    text = chat(
        folders, "one", f"/save {tmp_path}/a", "two", f"/save {tmp_path}/a", "/reset", f"/save {tmp_path}/a", "n",
        "three", f"/save {tmp_path}/a", "", f"/load {tmp_path}/a",
    )  # fmt: skip
    assert text.count("holds another chat. Overwrite it? [y/N]") == 2 and text.count("not saved") == 2
    assert "4 messages, 0 in the memory only" in text
    chat(folders, "four", f"/save {tmp_path}/a", "y")
    restored = ChatSession.load(*make_chat_model("msw"), tmp_path / "a")
    assert restored.messages[0]["content"] == "four"


def test_a_full_disk_does_not_end_the_chat(folders, tmp_path):
    with full_disk():
        text = chat(folders, "one", f"/save {tmp_path}/a", "/memory")
    assert "File too large" in text and "0 of 2 messages in the memory only" in text.replace("\n", " ")


def test_converting_to_a_full_disk_ends_in_one_sentence(folders, tmp_path, monkeypatch, capsys):
    for number, option in enumerate(([], ["--public"])):
        monkeypatch.setattr(
            "sys.argv", ["deltamem", "convert", str(folders / "adapter"), f"{tmp_path}/{number}", *option]
        )
        with full_disk(2000), pytest.raises(SystemExit):
            main()
        assert f"{tmp_path}/{number}/" in capsys.readouterr().err


def test_chat_goes_on_with_a_saved_session_and_says_when_turns_leave(folders):
    assert "1 of" not in chat(folders, "more", options=["--session", folders / "session"])
    text = chat(folders, *["some more words"] * 6, options=["--window", "200"])
    assert "messages have left the prompt and stay in the memory only" in text


def test_the_adapters_own_backbone_is_the_default(folders):
    text = deltamem("chat", "--adapter", folders / "adapter", "--device", "cpu", input="/memory\n")
    assert "0 tokens in the prompt" in text


def test_a_registered_model_names_its_backbone(folders, tmp_path):
    write_model_folder(folders / "adapter", folders / "base", "digest", tmp_path / "model")
    config = tmp_path / "model" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/elsewhere"}))
    text = deltamem("chat", "--model", tmp_path / "model", "--device", "cpu", input="/memory\n")
    assert "0 tokens in the prompt" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chat"], "name the adapter"),
        (
            ["chat", "--adapter", "ADAPTER", "--base", "/no/such/folder"],
            "there is no such folder, and as a Hub id",
        ),
        (["chat", "--adapter", "BASE", "--base", "BASE"], "holds no adapter"),
        (["chat", "--adapter", "ADAPTER", "--dtype", "int3"], "--dtype int3"),
        (["chat", "--adapter", "ADAPTER", "--session", "BASE"], "holds no saved session"),
        (["inspect", "BASE"], "holds no adapter"),
        (["convert", "ADAPTER", "BASE"], "isn't an empty folder"),
        (["average", "BASE", "ADAPTER", "ADAPTER"], "isn't an empty folder"),
        (["average", "BASE/mean", "ADAPTER"], "a mean is of two adapters or more"),
        (["serve", "--adapter", "ADAPTER", "--host", "0.0.0.0"], "set an API key"),
        (["serve", "--adapter", "ADAPTER", "--port", "TAKEN"], "choose another --port"),
        (["serve", "--adapter", "ADAPTER", "--store", "BASE/config.json"], "choose another folder"),
        (["chat", "--adapter", "ADAPTER", "--top-p", "0"], "top_p must be a number > 0, at most 1"),
        (["chat", "--adapter", "ADAPTER", "--strength", "nan"], "strength must be a number"),
        (["serve", "--adapter", "ADAPTER", "--strength", "nan", "--port", "FREE"], "strength must be a finite number"),
        (["serve", "--adapter", "ADAPTER", "--history", "some"], "choose whole or new"),
        (["serve", "--adapter", "ADAPTER", "--allow-origin", "*"], "every web page could use the server"),
        (["serve", "--adapter", "ADAPTER", "--allow-origin", "chat.example"], "name a page's origin as https://"),
        (["serve", "--adapter", "ADAPTER", "--allow-origin", "https://chat.example/"], "without a path"),
        (["serve", "--adapter", "ADAPTER", "--adapter", "ADAPTER", "--port", "FREE"], "are called adapter"),
        (["serve", "--adapter", "ADAPTER", "--adapter", "x=ADAPTER", "--port", "FREE"], "need --engine vllm"),
        (["serve", "--adapter", "ADAPTER", "--adapter", "x=ADAPTER", "--name", "y", "--port", "FREE"], "NAME=ADAPTER"),
        (["serve", "--adapter", "ADAPTER", "--port", "FREE", "--engine", "vllm", "--compile"], "own decoding"),
        (["serve", "--adapter", "ADAPTER", "--model", "models:/x@y", "--port", "FREE"], "either --adapter"),
        (["chat", "--adapter", "ADAPTER", "--device", "nonsense"], "can't be loaded on nonsense"),
        (["chat", "--adapter", "ADAPTER", "--session", "SESSION", "--window", "99"], "are for a new session"),
        (["inspect", "ADAPTER", "--png", "x.bmp"], "must end in .png"),
        (["inspect", "ADAPTER", "--png", "BASE/none/x.png"], "none/x.png"),
        (["inspect", "ADAPTER", "--text", "x"], "name the backbone, too"),
        (["inspect", "ADAPTER", "--base", "BASE", "--text", "BASE/none"], "it can't be read"),
        (["inspect", "SESSION", "--base", "BASE"], "holds no adapter"),
        (["convert", "ADAPTER", "BASE/config.json/x"], "Not a directory"),
        (["tps", "--adapter", "ADAPTER", "--output", "BASE/none/x.json"], "there is no folder"),
        (["tps", "--adapter", "ADAPTER", "--prompt-tokens", "99999999"], "the backbone's window is"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(folders, arguments, message, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {name.upper(): str(folders / name) for name in ("adapter", "base", "session")}
        places["FREE"] = str(free_port())
        places["TAKEN"] = str(taken.getsockname()[1])
        for place, path in places.items():
            arguments = [argument.replace(place, path) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["deltamem", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    errors = capsys.readouterr().err
    assert ended.value.code == 1 and message in errors and "Traceback" not in errors


@pytest.mark.parametrize("what", ["adapter", "session", "memory"])
def test_inspect_shows_each_layer_and_draws_them(folders, tmp_path, what):
    path = next((folders / "session").glob("memory-*")) if what == "memory" else folders / what
    picture = tmp_path / "picture.png"
    text = deltamem("inspect", path, "--png", picture)
    expected = {
        "adapter": ["MSW", "3 layers × 4 states of 8×8", "0.1824", "‖Δ_o‖"],
        "session": ["2, of which 0", "3,072 bytes", "directions in use"],
        "memory": ["3,072 bytes", "largest entry"],
    }[what]
    for words in expected:
        assert words in text
    for layer in range(3):
        assert re.search(rf"^ +{layer} +[\d,.]+ ", text, re.MULTILINE)
    assert image.imread(picture).std() > 0.01, "the picture is empty"


def test_gates_that_differ_a_little_are_told_apart_on_a_picture_that_fits_a_screen(folders, tmp_path):
    inspection = inspect(str(folders / "adapter"))
    gates = {layer: torch.linspace(0.15, 0.2, 8)[None] for layer in range(30)}
    save_picture(replace(inspection, tiles=gates), tmp_path / "gates.png")
    picture = image.imread(tmp_path / "gates.png")[..., :3]
    assert max(picture.shape) < 2000
    first_layer = picture[60:100, 20:260].reshape(-1, 3)
    assert len(np.unique(first_layer.round(1), axis=0)) >= 8


def test_inspect_measures_on_a_backbone_how_much_an_adapter_steers(folders, tmp_path):
    model = ["inspect", folders / "adapter", "--base", folders / "base", "--device", "cpu"]
    story = deltamem(*model)
    (tmp_path / "text").write_text("Short.")
    short = deltamem(*model, "--text", tmp_path / "text")
    for text in (story, short):
        assert "‖Δq‖/‖q‖" in text and "‖Δo‖/‖o‖" in text
    ratios = [[float(row.split()[-1]) for row in re.findall(r"^ +[012] .*$", t, re.MULTILINE)] for t in (story, short)]
    assert len(ratios[0]) == 3 and min(ratios[0] + ratios[1]) > 0 and ratios[0] != ratios[1]


def test_a_terminal_of_80_columns_shows_every_digit(folders):
    text = deltamem("tps", "--adapter", folders / "adapter", "--new-tokens", 4, "--runs", 1, columns=80)
    assert "delta-mem" in text and max(map(len, text.splitlines())) <= 80
    text = deltamem("inspect", folders / "adapter", columns=80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("0.1824") == 9
    text = deltamem("inspect", EXAMPLES / "smollm2-135m-instruct-text", columns=80)  # as many columns as there can be
    assert max(map(len, text.splitlines())) <= 80 and "7,374,720" in text
    assert len(re.findall(r"^ +\d+( +[\d.]+){12} *$", text, re.MULTILINE)) == 30


def test_convert_there_and_back_is_the_same_adapter(folders, tmp_path):
    deltamem("convert", folders / "adapter", tmp_path / "public", "--public")
    assert (tmp_path / "public" / "delta_mem_adapter.pt").is_file()
    deltamem("convert", tmp_path / "public", tmp_path / "ours")
    model, _ = make_chat_model("msw")
    back = DeltaMemModel.from_pretrained(make_chat_model("msw")[0].base_model, tmp_path / "ours")
    for name, parameter in model.memory_layers.state_dict().items():
        assert torch.equal(parameter, back.memory_layers.state_dict()[name])


def test_the_average_of_an_adapter_with_itself_is_that_adapter_in_half_the_size(folders, tmp_path):
    deltamem("average", tmp_path / "mean", folders / "adapter", folders / "adapter", "--bfloat16")
    sizes = [
        (folder / "adapter_model.safetensors").stat().st_size for folder in (tmp_path / "mean", folders / "adapter")
    ]
    assert sizes[0] < 0.6 * sizes[1]
    (_, mean), (_, own) = (load_adapter(folder) for folder in (tmp_path / "mean", folders / "adapter"))
    assert all(torch.equal(mean[name], tensor.bfloat16()) for name, tensor in own.items())


def test_tps_measures_the_backbone_and_the_adapter(folders, tmp_path):
    output = tmp_path / "tps.json"
    where = ["--adapter", folders / "adapter", "--device", "cpu", "--output", output]
    text = deltamem("tps", *where, "--prompt-tokens", 16, "--prompt-tokens", 32, "--new-tokens", 8, "--runs", 1)
    assert "prefill tok/s" in text
    results = json.loads(output.read_text())
    assert [(r["kind"], r["prompt_tokens"]) for r in results] == [
        ("base", 16), ("delta-mem", 16), ("base", 32), ("delta-mem", 32),
    ]  # fmt: skip
    rates = ("prefill_rate", "decode_rate", "slots_rate", "peak_bytes")
    assert all(0 < r[name] < float("inf") for r in results for name in rates)


def test_an_interrupted_reply_is_taken_back(monkeypatch):
    from deltamem.cli.chat import Terminal

    chat = ChatSession(*make_chat_model())
    lines = iter(["hello", "/memory"])
    console = Console(record=True, width=120)
    monkeypatch.setattr(console, "input", lambda prompt: next(lines, "/quit"))
    monkeypatch.setattr(ChatSession, "stream", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    Terminal(console, chat, {}).run()
    assert "the turn is taken back" in console.export_text() and chat.messages == []
