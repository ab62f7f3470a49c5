"""The configuration: what it accepts, what it resolves to, and what it says to mistakes."""

import json

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Config, config_hash, load_config, resolve_config
from pipelines.config.adapter import THIRDS, adapter_config
from pipelines.config.errors import RunConfigError
from pipelines.config.files import read_layers
from pipelines.config.json_schema import SCHEMA_FILE, schema_text
from pipelines.run import parts
from tests.paths import PROJECT

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


def settings(**changes) -> dict:
    """A small valid configuration; ``section__key=value`` changes one key of it."""
    base = {
        "name": "small",
        "backbones": {"b": {"source": "hub", "id": "someone/model"}},
        "strategies": {"s": {"adapter": {"strategy": "tsw"}}},
        "benchmarks": ["qasper"],
        "data": {"source": "generated"},
        "train": {},
        "evaluate": {},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        inside = base
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[key] = value
    return base


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_resolves_and_stands_alone(path, tmp_path, monkeypatch):
    config = load_config(path)
    assert config.name == path.stem
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resolved.json").write_text(config.to_json())
    monkeypatch.setattr("pipelines.config.files.PROJECT_ROOT", tmp_path)
    assert load_config("resolved.json") == config


def test_hashes_of_configurations_with_one_source_of_papers_are_what_they_were():
    """An adapter is trained again when its part changes: these are of the first release."""
    paper = load_config(PROJECT / "configs/paper.yaml")
    generated = {"train_papers": 48, "eval_papers": 8, "facts_per_paper": 6, "seed": 0}
    limits = {"max_written_tokens": 512, "max_read_tokens": 128, "processes": 2}
    data = {"source": "generated", "generated": generated, **limits}
    first = resolve_config(settings(data=data), "the first release's quickstart")
    assert config_hash(parts.preprocess(first)).startswith("11ce9b0602")
    assert config_hash(parts.preprocess(paper)).startswith("337062794c")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_fits_the_schema(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA_FILE.read_text()))


def test_the_schema_file_is_in_step():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run python -m pipelines.config.json_schema"


def test_the_papers_recipe():
    config = load_config(PROJECT / "configs/paper.yaml")
    assert len(parts.cells(config)) == 3 * (3 + 4)
    assert set(config.benchmarks) >= {"locomo", "hotpotqa", "ifeval", "gpqa_diamond", "memory_agent_bench"}
    untrained = {name for name, strategy in config.strategies.items() if not strategy.trained}
    assert untrained == {"bm25", "llmlingua2", "memory_bank"}
    train = config.cell("qwen3-8b", "msw", 42).train
    assert (train.learning_rate, train.batch_size, train.epochs, train.max_steps) == (2e-4, 32, 1, None)
    assert (train.warmup_ratio, train.weight_decay, train.gradient_clipping) == (0.1, 0.0, 1.0)
    assert (train.schedule, train.precision, train.num_workers) == ("cosine", "bfloat16", 8)
    assert (train.write_penalty, train.write_target) == (0.01, 0.05)
    assert (config.data.max_written_tokens, config.data.max_read_tokens) == (8192, 512)
    assert config.data.overlong == "drop"
    zero = train.deepspeed["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (2, 5e8, 5e8)
    assert zero["overlap_comm"] and zero["contiguous_gradients"] and zero["reduce_scatter"]


@pytest.mark.parametrize("name", ["paper", "paper_release"])
def test_the_papers_configurations_say_of_each_key_where_it_comes_from(name):
    tags = ("[paper]", "[release]", "[authors]", "[here]")
    text = (PROJECT / f"configs/{name}.yaml").read_text()
    meanings, _, keys = text.partition("\nname:")
    assert all(tag in meanings for tag in tags)
    lines = [line for line in keys.splitlines()[1:] if line and not line.lstrip().startswith("#")]
    told = [line for line in lines if not line.endswith(":")]
    assert len(told) > 35 and [line for line in told if not any(tag in line for tag in tags)] == []


def test_the_papers_recipe_in_its_authors_way():
    config, plain = (load_config(PROJECT / f"configs/{name}.yaml") for name in ("paper_release", "paper"))
    assert config.train == plain.train and set(config.backbones) == set(plain.backbones)
    assert set(config.benchmarks) == set(plain.benchmarks)
    protocols = {name: getattr(entry, "protocol", None) for name, entry in config.benchmarks.items()}
    assert protocols == {name: None if name == "qasper" else "release" for name in config.benchmarks}
    assert [name for name, entry in config.benchmarks.items() if getattr(entry, "draws", False)] == ["locomo"]
    adapters = [adapter_config(entry.adapter, 3) for entry in config.strategies.values() if entry.kind == "delta"]
    starts = {(adapter.rank, adapter.output_init) for adapter in adapters}
    assert starts == {(8, "base_slice")}, "at rank 8 the release's scripts start from the same columns"
    assert adapter_config(config.strategies["ssw"].adapter, 3).segment_rule == "release_message"
    assert config.data.sources["release"].hub_id == "huaXiaKyrie/delta-mem-qasper-data"
    assert config.data.weights["qasper"] == 0 and config.data.sources["qasper"].form == "release"


def test_a_benchmarks_protocol_leaves_the_hashes_of_official_entries_as_they_are():
    entry = {"kind": "locomo", "version": 1, "file": "x.json"}
    official, release, drawn = (
        resolve_config(settings(benchmarks={"m": entry | more}, register={"champion_metric": "m/f1"}), "here")
        for more in ({}, {"protocol": "release"}, {"sampled": True})
    )
    before = parts.evaluate(official, "frozen", "m")["benchmark"]
    assert not {"protocol", "sampled"} & before.keys()
    assert parts.evaluate(release, "frozen", "m")["benchmark"] == before | {"protocol": "release"}
    assert (official.benchmarks["m"].draws, release.benchmarks["m"].draws, drawn.benchmarks["m"].draws) == (
        False, True, True
    )  # fmt: skip
    assert resolve_config(json.loads(release.to_json()), "again") == release


def test_the_evidence_table():
    config = load_config(PROJECT / "configs/evidence_table.yaml")
    assert len(parts.cells(config)) == 7 * 2
    asked = parts.evaluations(config)
    # seven benchmarks; the two baselines that change the history have nothing to do on IFEval
    assert len(asked) == len(set(asked)) == 7 + 2 * 6 + 14 * 7
    assert {strategy for _, strategy, _, name in asked if name == "ifeval"} == {
        "frozen", "tsw", "ssw", "msw", "context2lora", "lora_without_context", "memgen", "mlp_memory"
    }  # fmt: skip
    assert config.benchmarks["ttl_trec_coarse"].shots == 400  # as its file says, with the data from elsewhere


def test_a_strategys_overrides_hold_in_its_cells_alone():
    changed = {"adapter": {"strategy": "ssw"}, "train": {"learning_rate": "5e-3", "max_steps": 7}}
    config = resolve_config(settings(strategies__t=changed, train__epochs=3), "here")
    assert config.cell("b", "t", 42).train.learning_rate == 5e-3
    assert config.cell("b", "t", 42).train.epochs == 3
    assert config.cell("b", "s", 42).train == config.train
    with pytest.raises(RunConfigError, match="strategies: 'x' is not among s, t"):
        config.cell("b", "x", 42)
    with pytest.raises(RunConfigError, match="seeds: 1 is not among"):
        config.cell("b", "s", 1)


def test_a_backbones_overrides_hold_on_it_alone_and_a_strategys_go_before_them():
    other = {"source": "hub", "id": "x/y", "train": {"write_penalty": 0.0, "learning_rate": 1e-3}}
    changes = {"adapter": {"strategy": "ssw"}, "train": {"learning_rate": 5e-3}}
    config = resolve_config(settings(backbones__c=other, strategies__t=changes), "here")
    assert config.cell("b", "s", 42).train == config.train
    assert config.cell("c", "s", 42).train == config.train.model_copy(update=other["train"])
    assert config.cell("c", "t", 42).train.learning_rate == 5e-3
    assert config.cell("c", "t", 42).train.write_penalty == 0.0
    assert parts.backbone(config, "c") == {  # it isn't fetched again for them
        "name": "c", "backbone": {**parts.backbone(config, "b")["backbone"], "id": "x/y"}
    }  # fmt: skip
    paper = load_config(PROJECT / "configs/paper.yaml")
    penalties = {name: paper.cell(name, "tsw", 42).train.write_penalty for name in paper.backbones}
    assert penalties == {"qwen3-4b-instruct-2507": 0.01, "qwen3-8b": 0.01, "smollm3-3b": 0.0}


def test_keys_that_are_off_and_validation_leave_the_hashes_as_they_are():
    plain = resolve_config(settings(), "here")
    assert not {"quantization", "train"} & parts.backbone(plain, "b")["backbone"].keys()
    watched = resolve_config(settings(train__validate_every=5, train__validation_questions=9), "here")
    assert parts.train(watched, "b", "s", 42) == parts.train(plain, "b", "s", 42)
    assert (
        not {"contrast", "repeat_text", "write_after", "keep_distribution", "cuda_graphs"}
        & parts.train(plain, "b", "s", 42)["train"].keys()
    )
    contrasted = resolve_config(settings(train__contrast={}), "here")
    assert parts.train(contrasted, "b", "s", 42)["train"]["contrast"] == {"weight": 0.5, "until": 0.5}
    started = resolve_config(settings(train__init_adapter="x/y"), "here")
    assert parts.train(started, "b", "s", 42)["train"]["init_adapter"] == "x/y"


MISTAKES = [
    ({"backbones__b__train": {"lerning_rate": 1}}, "here: backbones.b.train.lerning_rate: unknown key; did you mean"),
    ({"backbones__b__quantization": {"bits": 4}}, "here: backbones.b.quantization: expected a quant_method"),
    ({"train__learning_rate": "fast"}, "here: train.learning_rate: expected a number, got 'fast'"),
    ({"train__write_after": {"texts": [0, 1]}}, "here: train.write_after: .*shares has 4 entries for 2 numbers"),
    ({"train__cuda_graphs": True, "train__use_gpu": False}, "here: train: cuda_graphs needs a GPU"),
    (
        {"train__cuda_graphs": True, "train__activation_checkpointing": "full"},
        "here: train: cuda_graphs can't be captured with activation_checkpointing",
    ),
    (
        {"train__cuda_graphs": True, "strategies__t": {"adapter": {"strategy": "ssw"}}},
        "here: strategies.t: train.cuda_graphs: ssw writes as many segments as a batch happens to have",
    ),
    (
        {"strategies__t": {"kind": "lora", "context": True, "train": {"cuda_graphs": True}}},
        "here: strategies.t: train.cuda_graphs: only δ-mem adapters have them",
    ),
    (
        {"train__keep_distribution": 0.4},
        "here: strategies.s: train.keep_distribution keeps how the frozen backbone replies, and no entry of data",
    ),
    ({"train__learning_rate": 0}, "here: train.learning_rate: expected greater than 0, got 0"),
    ({"train__learning_rate": float("inf")}, "here: train.learning_rate: expected a finite number"),
    ({"train__lerning_rate": 1}, "here: train.lerning_rate: unknown key; did you mean 'learning_rate'?"),
    ({"train__max_steps": 1.5}, "here: train.max_steps: expected an integer, got 1.5"),
    ({"train__epochs": True}, "here: train.epochs: expected an integer, got True"),
    ({"train__use_gpu": "yes"}, "here: train.use_gpu: expected a boolean, got 'yes'"),
    ({"train__deepspeed": "nowhere.json"}, "nowhere.json: can't read this file"),
    ({"train": 3}, "here: train: expected keys with values, got 3"),
    ({"regster": {}}, "here: regster: unknown key; did you mean 'register'?"),
    (
        {"register__champion_metrc": "x"},
        "register.champion_metrc: unknown key; did you mean 'champion_metric'",
    ),
    ({"register__champion_metric": "x/nll"}, "register.champion_metric: benchmark 'x' is not among qasper"),
    ({"data__source": "files"}, "here: data: source 'files' needs train_files and eval_files"),
    (
        {"data__generated__train_paper": 1},
        "data.generated.train_paper: unknown key; did you mean 'train_papers'?",
    ),
    ({"backbones__b__dtype": "int8"}, "backbones.b.dtype: expected 'float32', 'bfloat16' or 'float16'"),
    ({"backbones__b__idd": "x"}, "here: backbones.b.idd: unknown key; did you mean 'id'?"),
    ({"backbones__b": {"id": "x"}}, "backbones.b: the key 'source' is required"),
    ({"backbones__b__source": "web"}, "backbones.b: 'source' expected one of 'hub', 'local'"),
    ({"backbones": ["qwen3-4b"]}, "no file configs/backbones/qwen3-4b.yaml for 'qwen3-4b'"),
    ({"backbones": []}, "here: backbones: "),
    ({"strategies": ["tsx"]}, "configs/strategies/tsx.yaml for 'tsx'; did you mean 'tsw'?"),
    ({"strategies": ["tsw", "tsw"]}, "here: strategies: 'tsw' is listed twice"),
    ({"strategies__s__adapter": {"rnk": 4}}, "strategies.s.adapter: unknown .*'rnk'; did you mean 'rank'?"),
    ({"strategies__s": {"from": "tsx"}}, "configs/strategies/tsx.yaml for 'tsx'; did you mean 'tsw'?"),
    ({"strategies__s": {"from": 3}}, "strategies: 'from' expects the name of a file in configs/strategies, got 3"),
    (
        {"strategies__s": {"from": "tsw", "adaptr": {}}},
        "here (from configs/strategies/tsw.yaml): strategies.s.adaptr: unknown key; did you mean 'adapter'?",
    ),
    ({"strategies__s__adapter": {"layers": "first"}}, "strategies.s.adapter: layers must be .* first_third"),
    ({"evaluate__gpus": 0.3}, "evaluate.gpus: expected whole GPUs or an even share of one (0.5, 0.33, 0.25, … down"),
    ({"train__gpus_per_worker": 0.25}, "here: train: 8 workers with gpus_per_worker 0.25 would share GPUs, which NCCL"),
    ({"strategies__s__adapter": {"strategy": "xsw"}}, "strategies.s.adapter: strategy must be one of"),
    ({"strategies__s__train": {"seed": 1}}, "here: strategies.s.train.seed: unknown key"),
    ({"strategies__frozen": {"adapter": {}}}, "strategies.frozen: this name is kept"),
    ({"benchmarks": {"q": {"kind": "qasper"}}}, "benchmarks.q.version: this key is required"),
    ({"benchmarks": ["qaspr"]}, "configs/benchmarks/qaspr.yaml for 'qaspr'; did you mean 'qasper'?"),
    ({"evaluate__conditions": ["none", "all"]}, "evaluate.conditions.1: expected 'none', 'state'"),
    ({"evaluate__conditions": ["none", "none"]}, "evaluate.conditions: expected every value once"),
    ({"seeds": [1, 1]}, "here: seeds: expected every value once"),
    (
        {"strategies": {"tsw": {"from": "tsw"}, "msw": None}},
        "here: strategies.msw: this entry is empty; write {from",
    ),
    (
        {"strategies": ["tsw", {"msw": {"train": {}}}]},
        "as a mapping, strategies: {tsw: {from: tsw}, …}",
    ),
    (
        {"benchmarks": {"qasper": {"kind": "qasper", "versoin": 1}}},
        "benchmarks.qasper.versoin: unknown key; did",
    ),
    ({"data": {}}, "here: data: give sources (names of files in configs/data), or source: generated, files or hub"),
    ({"data": {"sources": ["squad"], "source": "hub"}}, "here: data: give sources or source, not both"),
    ({"data": {"sources": ["sqaud"]}}, "here: data.sources: no file configs/data/sqaud.yaml for 'sqaud'; did you mean"),
    ({"data": {"sources": {"squad": None}}}, "here: data.sources.squad: this entry is empty; write {from: squad}"),
    (
        {"data": {"sources": {"squad": {"from": "squad", "weight": -1}}}},
        "data/squad.yaml): data.sources.squad.weight: exp",
    ),
    (
        {"data": {"sources": {"squad": {"from": "squad", "start": 0.5}}}},
        "no source with a weight is drawn from at 0 of the steps",
    ),
    (
        {"data": {"sources": {"squad": {"from": "squad", "start": 0.5, "stop": 0.2}}}},
        "start 0.5 isn't before stop 0.2",
    ),
    (
        {"data": {"sources": {"squad": {"from": "squad", "texts": "others"}}}},
        "texts: others have no questions of their own; give gaps",
    ),
    (
        {"data": {"sources": {"generated": {"kind": "generated", "tolt": 1}}}},
        "sources.generated.tolt: unknown key",
    ),
    (
        {"data": {"sources": {"chat": {"kind": "chat"}}}},
        "data.sources.chat: give train_files, or the hub_id",
    ),
    (
        {"data": {"sources": {name: {"from": name, "weight": 0} for name in ("squad", "tweetqa")}}},
        "here: data: the weights of squad, tweetqa sum to 0; give at least one source a weight",
    ),
    (
        {"data": {"sources": ["squad"], "steps": "even"}},
        "here: data.steps: expected 'mixed' or 'homogeneous', got 'even'",
    ),
    ({"name": "a/b"}, "here: name: String should match pattern"),
]


@pytest.mark.parametrize(
    ("changes", "message"), MISTAKES, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_mistake_is_named_with_key_file_and_reason(changes, message):
    with pytest.raises(RunConfigError) as error:
        resolve_config(settings(**changes), "here")
    if ".*" in message:
        assert error.match(message.replace("?", r"\?"))
    else:
        assert message in str(error.value)


def test_a_mistake_in_a_named_file_names_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs/strategies"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("adaptr: {strategy: tsw}\n")
    with pytest.raises(RunConfigError) as error:
        resolve_config(settings(strategies=["mine"]), "here")
    assert "configs/strategies/mine.yaml: strategies.mine.adaptr: unknown key; did you mean 'adapter'?" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "name: [", "c.yaml: not valid YAML"),
        ("c.json", "{", "c.json: not valid JSON"),
        (
            "c.yaml",
            "name: a\nseeds: [1]\nseeds: [5]\n",
            "c.yaml: line 3: the key 'seeds' stands in line 2 already; keep",
        ),
        ("c.yaml", "train: {epochs: 1,\n  epochs: 2}\n", "c.yaml: line 2: the key 'epochs' stands in line 1 already"),
        ("c.json", '{"seeds": [1], "seeds": [5]}', "c.json: the key 'seeds' stands twice in one object; keep one"),
        ("c.yaml", "- 1", "c.yaml: expected keys with values, got list"),
        ("c.yaml", "", "c.yaml: expected keys with values, got NoneType"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunConfigError, match=message):
        load_config(tmp_path / name)


def layers(folder, *files, **command_line):
    paths = [folder / f"{number}.yaml" for number in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    return read_layers(paths, command_line)


def test_keys_brought_in_by_a_yaml_merge_may_be_written_again(tmp_path):
    found = layers(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert found["b"] == {"x": 3, "y": 2}


def test_files_are_laid_over_one_another_section_by_section(tmp_path):
    found = layers(tmp_path, "train: {epochs: 1, batch_size: 4}\nseeds: [1, 2]\n", "train: {epochs: 3}\nseeds: [5]\n")
    assert found == {"train": {"epochs": 3, "batch_size": 4}, "seeds": [5]}


def test_a_mapping_laid_over_a_list_of_names_keeps_the_others(tmp_path):
    below = "strategies: [tsw, msw]\ndata: {sources: [squad, tweetqa]}\n"
    above = "strategies: {tsw: {train: {max_steps: 3}}}\ndata: {sources: {squad: {weight: 2}}}\n"
    found = layers(tmp_path, below, above)
    assert found["strategies"] == {"tsw": {"from": "tsw", "train": {"max_steps": 3}}, "msw": {"from": "msw"}}
    assert found["data"]["sources"] == {"squad": {"from": "squad", "weight": 2}, "tweetqa": {"from": "tweetqa"}}
    assert layers(tmp_path, below, "strategies: [msw]\n")["strategies"] == ["msw"]


def test_the_command_lines_texts_are_read_as_yaml_reads_them(tmp_path):
    given = {
        "train": {"learning_rate": "0.5", "max_steps": "null", "use_gpu": "false"},
        "seeds": ["1", "2"],
        "name": "x",
    }
    found = layers(tmp_path, "train: {epochs: 2}\n", **given)
    assert found["train"] == {"epochs": 2, "learning_rate": 0.5, "max_steps": None, "use_gpu": False}
    assert (found["seeds"], found["name"]) == ([1, 2], "x")
    with pytest.raises(RunConfigError, match="line 2: the key 'a' stands"):
        layers(tmp_path, "name: x\n", "a: 1\na: 2\n")


def test_sources_are_named_like_backbones():
    sources = {"passages": {"from": "squad", "weight": "1e-1"}, "facts": {"kind": "generated", "told": "conversation"}}
    config = resolve_config(settings(data={"sources": sources, "steps": "homogeneous"}), "here")
    assert config.data.sources["passages"].train_files == ["data/squad/train-v1.1.json"]
    assert config.data.weights == {"passages": 0.1, "facts": 1.0}
    assert resolve_config(json.loads(config.to_json()), "again") == config
    listed = resolve_config(settings(data={"sources": ["squad", "told_facts"]}), "here")
    assert [source.kind for source in listed.data.named_sources.values()] == ["squad", "generated"]


def test_a_single_source_of_papers_is_the_source_of_its_kind():
    generated = resolve_config(settings(data={"source": "generated", "generated": {"seed": 3}}), "here").data
    assert {name: (s.kind, s.seed) for name, s in generated.named_sources.items()} == {"generated": ("generated", 3)}
    files = {"source": "files", "train_files": ["a"], "eval_files": ["b"]}
    (source,) = resolve_config(settings(data=files), "here").data.named_sources.values()
    assert (source.kind, source.train_files, source.eval_files) == ("qasper", ["a"], ["b"])


def test_an_entry_can_be_a_files_with_keys_of_its_own():
    strategies = {
        "q": {"from": "ssw", "adapter": {"steer": ["q"]}, "train": {"max_steps": 3}},
        "own": {"adapter": {"strategy": "msw"}},
    }
    benchmarks = {"qasper": {"from": "qasper", "version": 7}}
    config = resolve_config(settings(strategies=strategies, benchmarks=benchmarks), "here")
    assert config.strategies["q"].adapter == {"strategy": "ssw", "segment": "message", "steer": ["q"]}
    assert config.cell("b", "q", 42).train.max_steps == 3
    assert config.strategies["own"].adapter == {"strategy": "msw"}
    assert (config.benchmarks["qasper"].kind, config.benchmarks["qasper"].version) == ("qasper", 7)


@pytest.mark.parametrize(
    ("gpus", "accepted"),
    [(1, True), (2, True), (0.5, True), (0.33, True), (0.125, True), (0.0625, True), ("1e0", True)]
    + [(0.3, False), (1.5, False), (0, False), (-1, False), (0.01, False), (float("nan"), False), ("all", False)],
)
def test_gpus_are_whole_or_an_even_share_of_one(gpus, accepted):
    for section, key in (("train", "gpus_per_worker"), ("evaluate", "gpus")):
        changes = {f"{section}__{key}": gpus, "train__num_workers": 1}
        if accepted:
            assert getattr(getattr(resolve_config(settings(**changes), "here"), section), key) == float(gpus)
        else:
            with pytest.raises(RunConfigError, match=f"here: {section}.{key}: expected"):
                resolve_config(settings(**changes), "here")


def test_thirds_of_a_backbones_layers():
    thirds = [adapter_config({"layers": name}, 36).layers for name in THIRDS]
    assert thirds == [tuple(range(12)), tuple(range(12, 24)), tuple(range(24, 36))]
    for depth in range(3, 50):
        thirds = [adapter_config({"layers": name}, depth).layers for name in THIRDS]
        assert sum(thirds, ()) == tuple(range(depth))
        assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert adapter_config({"layers": [0, 2]}, 36).layers == (0, 2)
    assert adapter_config({}, 36).layers is None


def test_every_mistake_is_told_at_once():
    with pytest.raises(RunConfigError) as error:
        resolve_config(settings(train__epochs=0, evaluate__batch_size="many"), "here")
    assert "train.epochs" in str(error.value) and "evaluate.batch_size" in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)


@given(
    section=st.sampled_from(["train", "data", "evaluate", "register", "report", "backbones", "strategies", "seeds"]),
    key=st.sampled_from(["learning_rate", "source", "batch_size", "epochs", "b", "deepspeed", ""]),
    value=values,
)
def test_no_input_makes_anything_but_a_config_or_a_config_error(section, key, value):
    for content in (value, {key: value}):
        try:
            assert isinstance(resolve_config(settings(**{section: content}), "here"), Config)
        except RunConfigError as error:
            assert "here" in str(error) or "read this file" in str(error)


def test_hashes_see_values_and_not_their_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    config = resolve_config(settings(), "here")
    assert config_hash(config) == config_hash(resolve_config(settings(), "there"))


def test_parts_hold_what_their_stage_depends_on():
    before = resolve_config(settings(), "here")
    cell = ("b", "s", 42)
    ways = {
        "train__checkpoint_every": 3,
        "train__ray_address": "auto",
        "train__gpus_per_worker": 2,
        "data__processes": 1,
        "evaluate__gpus": 2,
    }
    after = resolve_config(settings(**ways), "here")
    assert parts.train(before, *cell) == parts.train(after, *cell)
    assert parts.preprocess(before) == parts.preprocess(after)
    assert parts.evaluate(before, "s", "qasper") == parts.evaluate(after, "s", "qasper")

    other = resolve_config(settings(train__write_penalty=0.5, data__overlong="truncate"), "here")
    assert parts.train(before, *cell) != parts.train(other, *cell)
    assert parts.preprocess(before) != parts.preprocess(other)
    mixtures = [
        resolve_config(
            settings(data={"sources": {"squad": {"from": "squad", "weight": weight, "write": write}}}), "here"
        )
        for weight, write in ((1, "passage"), (2, "passage"), (1, "sentence"))
    ]
    late = resolve_config(settings(data={"sources": {"squad": {"from": "squad", "start": 0.5}, "facts": {
        "kind": "generated"}}}), "here")  # fmt: skip
    always = resolve_config(settings(data={"sources": {"squad": {"from": "squad"}, "facts": {
        "kind": "generated"}}}), "here")  # fmt: skip
    assert parts.preprocess(late) == parts.preprocess(always)
    assert parts.train(late, *cell) == parts.train(always, *cell) | {"spans": {"squad": (0.5, 1.0)}}
    episodes = [parts.preprocess(config) for config in mixtures]
    trainings = [parts.train(config, *cell) for config in mixtures]
    assert episodes[0] == episodes[1] != episodes[2], "weights don't change episodes"
    assert trainings[0] == trainings[2] != trainings[1], "and what changes episodes reaches training through them"
    files = resolve_config(settings(data__train_files=["a.json"]), "here")
    assert parts.preprocess(before) == parts.preprocess(files), "generated papers don't come from files"


def test_the_control_beside_memories_of_real_text_is_trained_without_what_needs_a_memory():
    layers = [PROJECT / "configs" / name for name in ("remember.yaml", "overrides/remember_control.yaml")]
    config = resolve_config(read_layers(layers, {}), "remember and its control")
    control, memory = (config.cell(*config.backbones, name, 42) for name in ("lora_without_context", "remember"))
    assert memory.train.contrast and memory.train.repeat_text
    assert not control.train.contrast and not control.train.repeat_text
    assert control.train.max_steps == memory.train.max_steps and not control.strategy.context
