"""What the pages show works: commands are known with their options, Python runs."""

import importlib
import re
import shlex
from pathlib import Path

import mlflow
import pytest
import typer
import yaml
from mlflow import MlflowClient
from snakemake.cli import parse_args

from deltamem.cli import app
from pipelines.config import load_config, resolve_config
from pipelines.config.files import read_mapping
from pipelines.evaluation.records import write_parquet
from pipelines.registry.model_folder import write_model_folder
from tests.docs.pages import PAGES, blocks, commands, run
from tests.paths import PROJECT
from tests.tiny_models import make_chat_model


def parse(command, words: list[str]) -> None:
    """Parses a command line of click, subcommands first; what is wrong with it raises."""
    while hasattr(command, "get_command") and not words[0].startswith("-"):
        name, *words = words
        command = command.get_command(command.context_class(command), name)
        assert command is not None, name
    try:
        command.make_context(command.name, list(words))
    except typer.Exit:  # --help
        pass


def check_make(words):
    targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def check_snakemake(words):
    if "workflow/profiles/slurm" in words:
        pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs the extra `slurm`")
    _, options = parse_args(words)
    first, *others = options.configfile or ["configs/quickstart.yaml"]
    load_config(first)
    assert all(Path(name).exists() for name in others)


def check_python(words):
    if words[0] != "-m":
        assert (PROJECT / words[0]).is_file()
    elif words[1] != "pytest":
        module = importlib.import_module(words[1])
        parse(typer.main.get_command(getattr(module, "app", None) or typer_app(module.main)), words[2:])


def typer_app(function):
    """What ``typer.run(function)`` runs."""
    made = typer.Typer()
    made.command()(function)
    return made


def check_docker(words):
    if words[0] == "run":
        image = next(i for i, word in enumerate(words) if word.partition(":")[0] == "deltamem")
        name, *rest = words[image + 1 :]
        CHECKS[name](rest)


def check_sbatch(words):
    script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    assert Path(words[script]).is_file()
    check_snakemake(words[script + 1 :])


CHECKS = {
    "docker": check_docker,
    "sbatch": check_sbatch,
    "make": check_make,
    "snakemake": check_snakemake,
    "python": check_python,
    "deltamem": lambda words: parse(typer.main.get_command(app), words),
    "mlflow": lambda words: parse(importlib.import_module("mlflow.cli").cli, words),
    "ray": lambda words: parse(importlib.import_module("ray.scripts.scripts").cli, words),
    "export": lambda words: None,
}


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_a_command_is_known_with_its_options(words, monkeypatch):
    monkeypatch.chdir(PROJECT)
    CHECKS[words[0]](words[1:])


@pytest.mark.parametrize("text", [block for page in PAGES for block in blocks(page, "yaml")])
def test_what_a_page_shows_of_a_configuration_is_one(text):
    resolve_config(read_mapping(PROJECT / "configs/quickstart.yaml") | yaml.safe_load(text), "page")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a tiny chat model and its adapter, and a store where both are registered."""
    root = tmp_path_factory.mktemp("tiny")
    model, tokenizer = make_chat_model()
    model.base_model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model.save_pretrained(root / "adapter")
    (root / "base" / "backbone.json").write_text('{"digest": "of-base"}')
    write_model_folder(root / "adapter", root / "base", "of-base", root / "model")
    store = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(store, store)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", source=(root / "model").as_uri())
    client.set_registered_model_alias("tiny", "champion", "1")
    before = mlflow.get_tracking_uri()
    yield {
        "Qwen/Qwen3-4B-Instruct-2507": str(root / "base"),
        "path/to/adapter": str(root / "adapter"),
        "sqlite:///results/mlflow.db": store,
        "models:/deltamem-smollm2-135m-instruct@champion": "models:/tiny@champion",
    }
    mlflow.set_tracking_uri(before)


def test_using_an_adapter_in_python(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = run("docs/use.md", tiny)
    assert scope["memory"].batch_size == 1 and scope["two_questions"].batch_size == 2
    assert scope["session"].messages == scope["twin"].messages
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert "trainable params" in capsys.readouterr().out


def test_scoring_records_again(tmp_path, capsys):
    records = [{"condition": name, "question_id": "q", "nll": nll} for name, nll in (("none", 2.0), ("state", 1.0))]
    write_parquet(records, tmp_path / "records.parquet")
    shown = "results/quickstart/evals/smollm2-135m-instruct/tsw/seed42/qasper.records.parquet"
    run("docs/evaluate.md", {shown: str(tmp_path / "records.parquet")})
    assert re.search(r"none +2.0\nstate +1.0", capsys.readouterr().out)
