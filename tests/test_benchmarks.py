"""Every benchmark that runs without a GPU still runs: on a tiny shape, for its rows and not for its figures."""

import contextlib
import json
import time

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file

from benchmarks import (
    ablations,
    cluster_occupancy,
    eight_gpus,
    generation,
    machine,
    memory_curves,
    real_text,
    scaling,
    serving,
    small_steps,
    start_up,
    training_step,
)
from benchmarks.asking import find_set, some_questions
from benchmarks.measure import report, run_benchmark
from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks import Context, Question
from pipelines.config import load_config, resolve_config
from pipelines.config.errors import RunConfigError
from pipelines.config.strategies import LoraStrategy
from pipelines.reporting.methods import Methods
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.strategies.lora import make_lora, save_lora
from tests.paths import PROJECT


@pytest.mark.parametrize(
    "benchmark, words, told",
    [
        (generation, ["--shape", "tinny"], "no shape of the name tinny; there are qwen3-4b"),
        (serving, ["--base", "no/such/folder"], "no/such/folder: there is no such folder"),
        (real_text, ["no/such/folder", "a", "chat"], "no/such/folder is not a complete backbone folder"),
        (real_text, ["no/such/folder", "a", "chat", "qasper"], "qasper is read from a file, qasper=FILE"),
        (memory_curves, ["layers", "no/such/folder", "a", "tweets=b.json"], "there is no file b.json"),
        (
            memory_curves,
            ["layers", "no/such/folder", "a", "replies"],
            "no set of the name replies",
        ),
        (memory_curves, ["capacity", "no/such/folder", "a", "--facts", "0"], "greater than or equal to 1"),
        (serving, ["--strategy", "xsw"], "xsw"),
    ],
)
def test_a_slip_on_the_command_line_is_told_in_a_sentence(benchmark, words, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        run_benchmark(getattr(benchmark, "app", None) or (lambda: typer.run(benchmark.main)))
    errors = capsys.readouterr().err
    assert ended.value.code and told in errors and "Traceback" not in errors


def rows(path):
    return json.loads(path.read_text())["rows"]


def test_an_interval_is_told_behind_its_estimate(tmp_path, capsys):
    measured = {"set": "chat", "nll": 1.7123, "nll low": 1.55, "nll high": 1.9}
    measured |= {"f1": None, "f1 low": None, "f1 high": None}  # which isn't defined there
    report([measured], "Chats", torch.device("cpu"), tmp_path / "rows.json")
    said = capsys.readouterr()
    assert said.err == "set chat, nll 1.712 [1.55, 1.9]\n" and "1.712 [1.55, 1.9]" in said.out
    assert "low" not in said.out and rows(tmp_path / "rows.json") == [measured]


@pytest.mark.slow
def test_ablations_leave_what_the_report_shows(tmp_path, monkeypatch):
    config = load_config(PROJECT / "configs/ablations_facts.yaml")
    changed = json.loads(config.to_json()) | {"results_dir": str(tmp_path)}
    changed["backbones"] = ["tiny-random"]
    kept = ("tsw", "heads_q")
    changed["strategies"] = {name: changed["strategies"][name] for name in kept}
    changed["benchmarks"]["facts"] |= {"facts": [1], "papers": 2, "questions": 1}
    changed["data"]["generated"] |= {"train_papers": 4, "eval_papers": 2}
    changed["train"] |= {"max_steps": 2, "batch_size": 6, "micro_batch_size": 3, "use_gpu": False}
    changed["train"] |= {"cuda_graphs": False}
    changed["evaluate"] |= {"use_gpu": False, "bootstrap_samples": 50, "max_new_tokens": 2}
    changed["seeds"] = [42]
    config = resolve_config(changed, "test")
    ablations.prepare(config)
    cells = ablations.in_order(config)
    assert [ablations.run_cell(config, cell)[:13] for cell in cells[:2]] == ["no effect", "memory effect"]
    assert [ablations.done(config, cell) for cell in cells] == [True, True, False]
    monkeypatch.setattr("sys.argv", ["ablations", str(tmp_path / "config.json"), "--processes", "1", "--minutes", "0"])
    (tmp_path / "config.json").write_text(config.to_json())
    ablations.main()
    assert all(ablations.done(config, cell) for cell in cells)
    before, after = (load_file(Layout(config).adapter_weights("tiny-random", name, 42)) for name in ("tsw", "heads_q"))
    assert before.keys() > after.keys() and any(value.abs().max() > 0 for value in before.values())
    assert (Layout(config).report / "ablations-tiny-random-facts.svg").is_file()


def test_every_strategy_gets_its_first_seed_before_any_gets_its_second():
    config = load_config(PROJECT / "configs/ablations_facts.yaml")
    chosen = ablations.only(config, None, [43, 42])
    cells = [("frozen", 0), ("tsw", 43), ("heads_q", 43), ("tsw", 42), ("heads_q", 42)]
    assert [cell[1:] for cell in ablations.in_order(chosen, ["heads_q", "tsw", "frozen"])] == cells
    assert len(ablations.in_order(config)) == 1 + 2 * len(config.strategies)
    with pytest.raises(RunConfigError, match="strategies: 'heads_w' is not among"):
        ablations.in_order(config, ["heads_w"])


def test_the_ablations_are_seen_to_change_one_thing_each():
    groups = Methods(load_config(PROJECT / "configs/ablations_facts.yaml")).groups()
    settings = {group: [setting for setting, _ in members] for group, members in groups.items()}
    assert settings == {
        "heads": ["q", "k", "v", "o", "qo", "qkvo"],
        "depth": ["first third", "middle third", "last third", "all"],
        "rank": ["4", "8", "16", "32"],
        "states": ["1", "2", "4", "8"],
        "write": ["token", "sentence", "message"],
        "questions": ["only read", "written"],
    }


def test_training_step(tmp_path):
    out = tmp_path / "rows.json"
    training_step.main(["tiny"], ["tsw", "ssw"], ["none"], written=24, read=8, repeats=1, device="cpu", out=out)
    assert [row["strategy"] for row in rows(out)] == ["backbone alone", "tsw", "ssw"]
    assert all(row["seconds"] > 0 for row in rows(out))


def test_generation(tmp_path):
    out = tmp_path / "rows.json"
    generation.main("tiny", ["tsw"], prefill=[16], context=8, batch=[2], tokens=2, repeats=1, device="cpu", out=out)
    found = {(row["what"], row["with"]) for row in rows(out)}
    assert len(found) == len(rows(out)) == 8 and all(row["value"] > 0 for row in rows(out))


def test_serving(tmp_path):
    out = tmp_path / "rows.json"
    serving.main(None, "tiny", "tsw", context=64, tokens=3, sessions=[2], repeats=1, device="cpu", out=out)
    named = {row["what"]: row for row in rows(out)}
    assert named["first token, resumed"]["tokens read"] < named["first token, from scratch"]["tokens read"]
    assert named["sessions, δ-mem"]["tokens/s"] > 0 and named["whole turns, saved"]["tokens/s"] > 0


def test_small_steps(tmp_path):
    out = tmp_path / "rows.json"
    small_steps.main("tiny", ["recipe"], ["plain", "graphed"], 1, 1, "float32", 0.1, device="cpu", out=out)
    plain, graphed = rows(out)
    assert plain["ms a step"] > 0 and plain["episodes/s"] > 0
    assert graphed["ms a step"] == "failed: RuntimeError"  # no GPU: the other ways have their figures all the same


@pytest.mark.slow
def test_scaling(tmp_path):
    out = tmp_path / "rows.json"
    scaling.main("tiny", "tsw", [1, 2], 32, 8, 2, 1, device="cpu", out=out)
    one, two = rows(out)
    assert one["efficiency"] == 1 and one["collectives"] < two["collectives"] < 1
    assert two["efficiency"] == pytest.approx(one["step s"] / (2 * two["step s"]))


def test_the_table_of_a_machine_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    broken = machine.Part(1, "training_step", "training_step --shape no-such")
    monkeypatch.setattr(machine, "PARTS", {"step": machine.PARTS["step"], "small": broken, "workers": broken})
    rehearsal = tmp_path / "rehearsal"
    rehearsal.mkdir()
    (rehearsal / "workers.json").write_text(json.dumps({"rows": [{"workers": 2, "efficiency": 0.5}]}))
    machine.main(tmp_path, tiny=True)
    said = capsys.readouterr()
    assert "workers: measured already" in said.err and "small: ended with 2; see" in said.err
    told = {cells[1].strip(): [cell.strip() for cell in cells[3:5]] for line in said.out.splitlines()
            if len(cells := line.split("│")) > 4}  # fmt: skip
    (_, *_, measured) = rows(rehearsal / "step.json")
    assert told["step 8,192 + 512 over its backbone"] == [f"{measured['over backbone']:.4g}", "rehearsed"]
    assert told["two workers, efficiency"] == ["0.5", "rehearsed"]
    assert "ended with 2" in told["evidence, episodes/s"][1] and told["decoding, batch 1, tok/s"][1] == "not measured"
    machine.main(tmp_path, minutes=0)  # to which a rehearsal's numbers are nothing
    said = capsys.readouterr()
    assert "small: needs 1 GPU" in said.err or "small: takes about 1 s, and 0 are left" in said.err
    assert "measured already" not in said.err and "rehearsed" not in said.out
    (tmp_path / "step.json").write_bytes((rehearsal / "step.json").read_bytes())
    before = (tmp_path / "step.json").stat().st_mtime_ns
    machine.main(tmp_path, minutes=0)
    assert "step: measured already" in capsys.readouterr().err
    assert (tmp_path / "step.json").stat().st_mtime_ns == before


def test_a_part_that_is_cut_short_leaves_no_process(tmp_path, monkeypatch):
    program, started = tmp_path / "program", tmp_path / "started"
    program.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {started}; wait\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert "wasn't done" in machine._run("step", "training_step", tmp_path / "step.json", 1.0)
    patience = time.monotonic() + 30  # what is killed dies soon, not at once
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(started.read_text()))
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < patience
            time.sleep(0.01)


def test_every_goal_is_read_from_a_part():
    assert {goal.part for goal in machine.GOALS} == set(machine.PARTS)
    assert sum(part.seconds for part in machine.PARTS.values() if part.gpus == 1) <= 600


@pytest.fixture
def backbone(tmp_path):
    spec = load_config(PROJECT / "configs" / "ci_mixture.yaml").entry("backbones", "tiny-random")
    lively = spec.architecture | {"initializer_range": 0.3}  # with the default it says one token over and over
    prepare_backbone("tiny-random", spec.model_copy(update={"architecture": lively}), tmp_path / "tiny-random")
    return tmp_path / "tiny-random"


@pytest.fixture
def adapter(backbone, tmp_path):
    strong = DeltaMemConfig(output_init="random", online_gain=0.5)  # so that its memory changes what is said
    get_delta_mem_model(load_backbone(backbone)[0], strong).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def squad(tmp_path):
    """A file in SQuAD's form: seven articles of one passage and one question each."""
    answers = [{"text": "in Lisbon", "answer_start": 12}]
    articles = []
    for number in range(10, 17):
        questions = [{"id": f"q{number}", "question": f"Where is Ada{number}?", "answers": answers}]
        articles.append(
            {"title": f"{number}", "paragraphs": [{"context": f"Ada{number} lives in Lisbon.", "qas": questions}]}
        )
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    return tmp_path / "squad.json"


def test_memory_curves(backbone, adapter, squad, tmp_path):
    arguments = {"questions": 3, "batch_size": 4, "samples": 50, "device": "cpu"}
    memory_curves.capacity(backbone, adapter, facts=[1, 2], out=tmp_path / "capacity", **arguments)
    memory_curves.retention(backbone, adapter, f"passages={squad}", [0, 2], out=tmp_path / "retention", **arguments)
    memory_curves.layers(backbone, adapter, f"passages={squad}", out=tmp_path / "layers", **arguments)
    for name, key, places in (("capacity", "facts", [1, 2]), ("retention", "texts after", [0, 2])):
        found = {(row[key], row["what"]): row for row in rows(tmp_path / name / "rows.json")}
        assert list(found) == [(place, what) for place in places for what in ("state", "swapped", "memory effect")]
        for place in places:
            state, swapped, effect = (found[place, what]["nll"] for what in ("state", "swapped", "memory effect"))
            assert effect == pytest.approx(swapped - state) and found[place, "state"]["questions"] == 3
    between = [found[place, "state"]["tokens after"] for place in (0, 2)]
    assert between[0] == 0 and 2 * len("Ada10 lives in Lisbon.") < between[1]
    layers = {row["layer"]: row["value"] for row in rows(tmp_path / "layers" / "rows.json")}
    assert list(layers) == ["all swapped", "all permuted", 0, 1]
    assert layers["all swapped"] == pytest.approx(found[0, "memory effect"]["nll"], rel=0.01) and all(layers.values())
    pictures = {f"{path.parent.name}/{path.stem}" for path in tmp_path.glob("*/*.svg")}
    assert pictures == {"capacity/exact_match", "retention/nll", "retention/f1", "layers/layers"}


def test_few_questions_are_of_many_documents():
    asked = {"a0": 2, "a1": 1, "b0": 2, "c0": 1}
    every = [
        Context(text, [], [Question(f"{text}/{n}", text[0], [], []) for n in range(count)])
        for text, count in asked.items()
    ]
    for limit, expected in ((3, "a0/0 b0/0 c0/0"), (4, "a0/0 a1/0 b0/0 c0/0"), (9, "a0/0 a0/1 a1/0 b0/0 b0/1 c0/0")):
        chosen = [question.question_id for context in some_questions(every, limit) for question in context.questions]
        assert sorted(chosen) == expected.split()


def test_chats_of_more_conversations_begin_with_those_of_fewer():
    few, many = ({c.context_id: c for c in find_set(entry).contexts()} for entry in ("chat=2", "chat=5"))
    assert len(many) == 2.5 * len(few) and all(many[name] == context for name, context in few.items())
    for wrong in ("two", "0", "-1", "2.5"):
        with pytest.raises(typer.BadParameter, match=f"not '{wrong}'"):
            find_set(f"chat={wrong}")


def test_other_texts_come_after_the_right_one_and_are_never_those_that_are_asked_about(squad):
    every = list(find_set(f"passages={squad}").contexts())
    asked = every[:3]
    few, many = (memory_curves.with_others_after(every, asked, count) for count in (2, 4))
    texts = {context.context_id: context.to_write for context in every}
    unasked = [message for context in every[3:] for message in context.to_write]
    for context, fewer, more in zip(asked, few, many, strict=True):
        assert fewer.to_write == more.to_write[:3] and more.to_write[:1] == texts[context.context_id]
        assert sorted(map(str, more.to_write[1:])) == sorted(map(str, unasked)) and more.questions == context.questions
    with pytest.raises(typer.BadParameter, match="5 other texts are to be written, and the set has 4"):
        memory_curves.with_others_after(every, asked, 5)


def test_real_text(backbone, adapter, squad, tmp_path):
    save_lora(make_lora(load_backbone(backbone)[0], LoraStrategy(kind="lora", context=False)), tmp_path / "lora")
    arguments = {"lora": tmp_path / "lora", "questions": 3, "batch_size": 4, "samples": 50, "device": "cpu"}
    real_text.main(backbone, adapter, [f"passages={squad}", "chat"], out=tmp_path / "out", **arguments)
    found = {(row["set"], row["model"], row["what"]): row for row in rows(tmp_path / "out" / "rows.json")}
    for name, metric in (("passages", "f1"), ("chat", "recalled")):
        kinds = [(model, what) for of, model, what in found if of == name]
        assert kinds == [
            *(("frozen", what) for what in ("none", "full")),
            *(("adapter", what) for what in ("none", "state", "swapped", "full")),
            *(("adapter", what) for what in ("memory effect", "context recovery")),
            *(("lora", "none"), ("adapter", "state − lora")),
        ]
        nll = {(model, what): found[name, model, what]["nll"] for model, what in kinds}
        assert nll["adapter", "memory effect"] == pytest.approx(nll["adapter", "swapped"] - nll["adapter", "state"])
        assert nll["adapter", "state − lora"] == pytest.approx(nll["lora", "none"] - nll["adapter", "state"])
        assert all(
            found[name, model, what]["questions"] == 3 and metric in found[name, model, what] for model, what in kinds
        )
    assert nll["adapter", "none"] != nll["frozen", "none"], "a chat's question is written as it is read"
    assert found["passages", "adapter", "none"]["nll"] == pytest.approx(found["passages", "frozen", "none"]["nll"])


def test_what_a_memory_costs_replies_is_against_the_frozen_model_s_own(backbone, adapter, tmp_path):
    generation = backbone / "generation_config.json"
    ending = {"eos_token_id": list(range(0, 256, 3))}  # or its replies, drawn at random, would have no end
    generation.write_text(json.dumps(json.loads(generation.read_text()) | ending))
    arguments = {"questions": 2, "batch_size": 4, "samples": 50, "device": "cpu"}
    real_text.main(backbone, adapter, ["replies"], out=tmp_path / "out", **arguments)
    found = {row["what"]: row for row in rows(tmp_path / "out" / "rows.json")}
    assert list(found) == ["strength_0", "none", "state", "steering effect", "empty effect"]
    frozen = found["strength_0"]
    assert frozen["f1"] == 1.0, "what the frozen model replies is its own reply"
    for effect, condition in (("steering effect", "state"), ("empty effect", "none")):
        assert found[effect]["nll"] == pytest.approx(frozen["nll"] - found[condition]["nll"]) != 0


def test_collectives_count_once_and_alone_only_while_nothing_is_computed():
    def span(name, start, end, cat="kernel"):
        return {"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": cat}

    step = span("ProfilerStep#3", 0, 100, "user_annotation")
    events = [
        step,
        span("gemm", 0, 40),
        span("ncclAllReduce", 30, 60),
        span("ncclAllGather", 50, 70),
        span("adam", 70, 90),
    ]
    assert eight_gpus.communication(events) == {"collectives": 0.4, "… alone": 0.3}
    on_cpu = [step, span("aten::mm", 0, 50, "cpu_op"), span("gloo:all_reduce", 50, 75, "user_annotation")]
    assert eight_gpus.communication(on_cpu) == {"collectives": 0.25, "… alone": 0.25}


def test_a_cluster_is_occupied_by_four_trainings_and_twelve_evaluations(tmp_path):
    cards = cluster_occupancy.Cards(2, gpu=True, share=0.25)
    config = cluster_occupancy.configuration(tmp_path, "ray", cards, "tiny", 5, 2, "127.0.0.1:1")
    assert len(parts.cells(config)) == 4 and len(cluster_occupancy.evaluations(config)) == 12
    look = cluster_occupancy.Look(1.0, trainings=1, evaluations=3, busy=None)
    assert cluster_occupancy.occupancy([look], cards) == 0.875


@pytest.mark.slow
def test_the_stages_of_a_start_add_up(tmp_path):
    start_up.main("tiny", workers=1, runs=1, beside=None, out=tmp_path / "out.json")
    training, evaluation = rows(tmp_path / "out.json")
    stages = [training[name] for name in ("driver", "Ray", "controller", "worker", "step")]
    assert min(stages) > 0 and sum(stages) == pytest.approx(training["all"])
    assert sum(training[f"{kind}'s CPU"] for kind in ("driver", "Ray", "controller", "worker")) == pytest.approx(
        training["CPU"]
    )
    assert evaluation["CPU"] > 0
