"""What runs take from the Hub, with the real libraries, of a stand-in that serves files of the same shape."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.backbones.record import backbone_digest
from pipelines.benchmarks import get_benchmark
from pipelines.benchmarks.memory_agent_bench import FILES
from pipelines.config import load_config
from pipelines.config.backbones import HubBackbone
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError
from pipelines.harness.tasks import run_lm_eval
from tests.hub import COMMIT, ask, running_hub
from tests.paths import PROJECT

TINY, ENCODER = "lab/Tiny-1M", "lab/Encoder-1M"
RELEASE = "datasets/huaXiaKyrie/delta-mem-qasper-data"
GPQA, MAB, HOTPOT = "datasets/Idavidrein/gpqa", "datasets/ai-hyz/MemoryAgentBench", "datasets/hotpotqa/hotpot_qa"
QASPER = "datasets/allenai/qasper"
GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def chat(number):
    contents = ("Answer from the notes.", f"Turn 1:\nThe value is {number}.", "What is the value?", str(number))
    roles = ("system", "user", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


def qasper_row(paper_id):
    answer = {"unanswerable": [False], "extractive_spans": [["red"]], "yes_no": [None], "free_form_answer": [""]}
    answer |= {"evidence": [["It is red."]], "highlighted_evidence": [["It is red."]]}
    asked = {"question": ["Which colour?"], "question_id": [f"{paper_id}-q"], "answers": [{"answer": [one(answer)]}]}
    text = {"section_name": ["Data"], "paragraphs": [["It is red."]]}
    return {"id": paper_id, "title": "T", "abstract": "A", "full_text": text, "qas": asked}


def one(columns):
    return {name: values[0] for name, values in columns.items()}


@pytest.fixture(scope="module")
def hub(tiny_backbone):
    with running_hub() as hub:
        model = {path.name: path.read_bytes() for path in tiny_backbone.iterdir() if path.name != "backbone.json"}
        hub.repos[TINY] = model | {"pytorch_model.bin": b"never asked for"}
        hub.repos["lab/Closed-1M"] = model
        hub.repos[ENCODER] = model | {"config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}'}
        chats = "\n".join(json.dumps(chat(number)) for number in range(60))
        hub.repos[RELEASE] = {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": chats.encode()}
        options = [f"option {number}" for number in range(4)]
        lines = [GPQA_COLUMNS, *(("How many?", *options) for _ in range(3))]
        card = b"---\nconfigs:\n- config_name: gpqa_diamond\n  data_files: gpqa_diamond.csv\n---\n"
        hub.repos[GPQA] = {"README.md": card, "gpqa_diamond.csv": "\n".join(map(",".join, lines)).encode()}
        row = {"questions": ["Which?"], "answers": [["blue"]], "metadata": {"source": "ruler_qa1"}}
        hub.repos[MAB] = {f"data/{name}": parquet([row | {"context": f"In {name}."}]) for name in FILES.values()}
        passages = {"title": ["A"], "sentences": [["A is public."]]}
        asked = {
            "id": "q1",
            "question": "Is it?",
            "answer": "yes",
            "type": "bridge",
            "level": "hard",
            "context": passages,
        }
        card = b"---\nconfigs:\n- config_name: distractor\n  data_files:\n"
        card += b"  - {split: validation, path: distractor/*}\n---\n"
        hub.repos[HOTPOT] = {"README.md": card, "distractor/validation-0.parquet": parquet([asked])}
        papers = {f"qasper/{split}/0000.parquet": parquet([qasper_row(split)]) for split in ("train", "validation")}
        hub.repos[QASPER] = papers
        hub.revisions |= {TINY: "v1", RELEASE: "v1", MAB: "v1", HOTPOT: "v1", QASPER: "refs%2Fconvert%2Fparquet"}
        hub.gated |= {GPQA, "lab/Closed-1M"}
        yield hub


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path):
    ask(hub, monkeypatch, tmp_path / "cache")
    hub.served.clear()
    return hub


def backbone(hub_id, revision=None):
    return HubBackbone(source="hub", id=hub_id, revision=revision, dtype="float32")


def source(revision=None, **changes):
    """The training set of paper_release.yaml."""
    settings = load_config(PROJECT / "configs" / "paper_release.yaml").data.named_sources["release"]
    return settings.model_copy(update={"hub_revision": revision, "eval_share": 0.1, **changes})


def benchmark(name, **changes):
    """A benchmark of paper.yaml."""
    settings = load_config(PROJECT / "configs" / "paper.yaml").benchmarks[name]
    return settings.model_copy(update=changes)


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_backbone_is_that_of_a_commit_and_a_download_that_broke_off_goes_on(
    at_hub, tiny_backbone, tmp_path, revision
):
    at_hub.cut["model.safetensors"] = 1000
    record = prepare_backbone("tiny", backbone(TINY, revision), tmp_path / "tiny")
    assert (record["revision"], record["digest"]) == (COMMIT, backbone_digest(tiny_backbone))
    weights = [(commit, start) for path, commit, start in at_hub.served if path == "model.safetensors"]
    assert weights == [(COMMIT, 0), (COMMIT, 1000)]
    assert "pytorch_model.bin" not in {path for path, _, _ in at_hub.served}
    load_backbone(tmp_path / "tiny")


def test_what_is_no_decoder_is_refused_before_its_weights_are_fetched(at_hub, tmp_path):
    with pytest.raises(StageError, match="is a BertModel, not a causal language model"):
        prepare_backbone("encoder", backbone(ENCODER), tmp_path / "encoder")
    assert {path for path, _, _ in at_hub.served} and not [s for s in at_hub.served if s[0].endswith(".safetensors")]


@pytest.mark.parametrize(
    ("hub_id", "revision", "told"),
    [
        (TINY, "v9", "has no revision 'v9'"),
        ("lab/Absent-1M", None, "no model 'lab/Absent-1M'"),
        ("lab/Closed-1M", None, "is gated: accept its terms on the Hub and log in with `hf auth login`"),
    ],
)
def test_a_backbone_that_the_hub_does_not_give_is_named_with_what_to_do(at_hub, tmp_path, hub_id, revision, told):
    with pytest.raises(StageError, match=told):
        prepare_backbone("refused", backbone(hub_id, revision), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_gated_backbone_is_fetched_by_whoever_may(at_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", at_hub.token)
    assert prepare_backbone("closed", backbone("lab/Closed-1M"), tmp_path / "closed")["revision"] == COMMIT


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_the_releases_training_set_is_read_whole_and_its_commit_noted(at_hub, tmp_path, revision):
    at_hub.cut["train.jsonl"] = 700
    parts = [load_corpus(source(revision), split, tmp_path) for split in ("train", "eval")]
    learnt = [document.exercises[0].references[0] for part in parts for document in part.documents]
    assert sorted(map(int, learnt)) == list(range(60)) and parts[1].documents
    assert next(iter(parts[0].documents)).messages[0]["content"] == "Answer from the notes."
    assert parts[0].origin["commit"] == COMMIT and parts[0].origin["revision"] == revision
    assert [(commit, start) for path, commit, start in at_hub.served if path == "train.jsonl"] == [
        (COMMIT, 0), (COMMIT, 700)
    ]  # fmt: skip


def test_a_revision_of_a_data_set_that_is_not_there_is_named(at_hub, tmp_path):
    with pytest.raises(StageError, match="Revision 'v9' doesn't exist.*'train_files'"):
        load_corpus(source("v9"), "train", tmp_path)


def test_qasper_is_read_from_the_hubs_own_parquet_files(at_hub, tmp_path):
    settings = load_config(PROJECT / "configs" / "paper.yaml").data.named_sources["qasper"]
    for split, name in (("train", "train"), ("eval", "validation")):
        (paper,) = load_corpus(settings, split, tmp_path).documents
        assert paper.document_id == name and paper.exercises[0].references == ["red"]


def test_memory_agent_benchs_files_are_fetched_once_and_a_download_that_broke_off_goes_on(at_hub):
    settings = benchmark("memory_agent_bench", hub_revision="v1")
    at_hub.cut[f"data/{FILES['TTL']}"] = 100
    contexts = list(get_benchmark("mab", settings).contexts())
    assert [context.context_id for context in contexts] == ["AR/0", "TTL/0", "LRU/0", "CR/0"]
    assert contexts[0].questions[0].references == ["blue"]
    assert at_hub.served.count((f"data/{FILES['TTL']}", "v1", 100)) == 1 and len(at_hub.served) == 5
    pinned = settings.model_copy(update={"hub_revision": COMMIT})
    assert list(get_benchmark("mab", pinned).contexts()) == contexts
    assert len(at_hub.served) == 5, "what the tag has brought is there under its commit"


def test_hotpotqas_columns_make_contexts(at_hub):
    settings = benchmark("hotpotqa", hub_revision="v1")
    (context,) = get_benchmark("hotpotqa", settings).contexts()
    assert context.history[0]["content"] == "Passage 1 - A:\nA is public."
    assert context.questions[0].references == ["yes"]


@pytest.mark.parametrize("token", [None, "hf_of_somebody_who_may_not"])
def test_gpqas_gate_is_told_with_what_to_do_before_a_question_is_asked(at_hub, tiny_backbone, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    model, tokenizer = load_backbone(tiny_backbone)
    with pytest.raises(StageError, match=r"is gated on the Hub. Accept its terms there.*hf auth login.*'data_file'"):
        run_lm_eval(model, tokenizer, benchmark("gpqa_diamond", max_new_tokens=1), batch_size=1)


def test_gpqa_is_asked_by_whoever_may_read_it(at_hub, tiny_backbone, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", at_hub.token)
    model, tokenizer = load_backbone(tiny_backbone)
    settings = benchmark("gpqa_diamond", max_new_tokens=1, max_questions=1)
    records, _ = run_lm_eval(model, tokenizer, settings, batch_size=1)
    assert [record["references"] for record in records][0][0] in ("(A)", "(B)", "(C)", "(D)")
