"""Damaged records: every benchmark names and counts them, keeps the others, and turns nothing into the text "None"."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.benchmarks import get_benchmark
from pipelines.config.benchmarks import HotpotqaSettings, LocomoSettings, MemoryAgentBenchSettings, TtlSettings
from pipelines.errors import StageError

NOT_ANSWERS = [
    (None, "its answer is null, not text"),
    (["a", "b"], "its answer is an array, not text"),
    ({"text": "a"}, "its answer is an object, not text"),
    (True, "its answer is a boolean, not text"),
    ("", "its answer is empty"),
    (" ", "its answer is empty"),
    (float("nan"), "its answer is nan, not a number"),
]


def hotpotqa(folder, *records):
    path = folder / "hotpot.json"
    path.write_text(json.dumps(records) if records and not isinstance(records[0], str) else records[0])
    return get_benchmark("b", HotpotqaSettings(kind="hotpotqa", version=1, file=str(path)))


def asked(question_id="q", answer="no", **changes):
    record = {"_id": question_id, "question": "Is it?", "answer": answer, "type": "bridge"}
    return record | {"context": [["A", ["It is not."]]]} | changes


def locomo(folder, *questions, **changes):
    turns = [{"speaker": "Ann", "dia_id": "D1:1", "text": "I got a dog."}]
    talk = {"speaker_a": "Ann", "speaker_b": "Bo", "session_1_date_time": "noon", "session_1": turns}
    sample = {"sample_id": "c", "conversation": talk, "qa": list(questions)} | changes
    path = folder / "locomo.json"
    path.write_text(json.dumps([sample]))
    return get_benchmark("b", LocomoSettings(kind="locomo", version=1, file=str(path), categories=[1, 3, 4, 5]))


def question(answer="a dog", category=4, **changes):
    return {"question": "What did she get?", "answer": answer, "category": category} | changes


def memory_agent_bench(folder, questions, answers, context="It is told."):
    row = {"context": context, "questions": questions, "answers": answers, "metadata": {"source": "ruler_qa1"}}
    schema = pa.schema([
        ("context", pa.string()), ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.list_(pa.string()))), ("metadata", pa.struct([("source", pa.string())])),
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema), folder / "Accurate_Retrieval-00000-of-00001.parquet")
    settings = MemoryAgentBenchSettings(kind="memory_agent_bench", version=1, folder=str(folder), competencies=["AR"])
    return get_benchmark("b", settings)


def learning(folder, dataset, text, **changes):
    path = folder / "data"
    path.write_text(text)
    options = {"train_file": str(path), "test_file": str(path), "shots": 2, "questions": 1, "contexts": 1} | changes
    return get_benchmark("b", TtlSettings(kind="test_time_learning", version=1, dataset=dataset, **options))


def ids(benchmark):
    return [question.question_id for context in benchmark.contexts() for question in context.questions]


def lost(benchmark):
    ((lost, reason),) = [(record.lost, record.reason) for record in benchmark.bad_records]
    return lost, reason


@pytest.mark.parametrize(("answer", "reason"), NOT_ANSWERS)
def test_an_answer_that_is_none_is_named_and_the_others_are_asked(tmp_path, answer, reason):
    hotpot = hotpotqa(tmp_path, asked("good"), asked("bad", answer))
    assert ids(hotpot) == ["good"]
    assert lost(hotpot) == ("record", f"not a HotpotQA question ({reason})")
    assert hotpot.bad_records[0].paper_id.endswith("hotpot.json, question 1")
    for category in (1, 3, 4, 5):
        conversations = locomo(tmp_path, question(answer, category), question())
        assert ids(conversations) == ["c/1"]
        assert lost(conversations) == ("question", f"not a LoCoMo question ({reason})")
        assert conversations.bad_records[0].question_id == "c/0"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([None], "its answer is null, not text"),
        (["a", ""], "its answer is empty"),
        ([], "it has no list of answers"),
        (None, "it has no list of answers"),
    ],
)
def test_a_question_of_memory_agent_bench_without_its_answers_is_named(tmp_path, answers, reason):
    bench = memory_agent_bench(tmp_path, ["Who?", "Where?"], [answers, ["there"]])
    assert ids(bench) == ["AR/0/1"]
    assert lost(bench) == ("question", f"not a question of MemoryAgentBench ({reason})")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "its question is null, not text"),
        ({"question": " "}, "its question is empty"),
        ({"context": None}, "'NoneType' object is not iterable"),
        ({"context": []}, "its passages are empty"),
        ({"type": 3}, "its type is a number, not text"),
    ],
)
def test_a_record_with_something_else_in_it_is_named(tmp_path, change, reason):
    hotpot = hotpotqa(tmp_path, asked("bad", **change), asked("good"))
    assert ids(hotpot) == ["good"]
    assert reason in lost(hotpot)[1]


def test_a_number_is_an_answer(tmp_path):
    assert [q.references for c in locomo(tmp_path, question(2022)).contexts() for q in c.questions] == [["2022"]]


def test_what_follows_the_semicolon_alone_is_no_answer(tmp_path):
    benchmark = locomo(tmp_path, question("; she has a dog", 3), question())
    assert ids(benchmark) == ["c/1"] and "its answer is empty" in lost(benchmark)[1]


@pytest.mark.parametrize(
    ("dataset", "text", "reason"),
    [
        ("banking77", "text,category\nhi,greet\nbye\nyo,greet\n", "its label is null"),
        ("banking77", "text,category\nhi,greet\n,greet\nyo,greet\n", "its text is empty"),
        ("trec_coarse", "0 How ?\n1\n0 Who ?\n", "not enough values to unpack"),
        ("trec_fine", "DESC:def How ?\nDESC What ?\nDESC:def Who ?\n", "there are no fine labels"),
        ("clinc150", json.dumps({"train": [["hi", "greet"], ["x", None]], "val": [["yo", "greet"]],
                                 "oos_train": [], "oos_val": []}), "its label is null"),
    ],
)  # fmt: skip
def test_an_example_without_text_or_label_is_named(tmp_path, dataset, text, reason):
    benchmark = learning(tmp_path, dataset, text)
    assert len(ids(benchmark)) == 1
    assert all(reason in record.reason for record in benchmark.bad_records) and benchmark.bad_records


def test_a_file_in_which_nothing_can_be_used_is_refused_with_its_first_record(tmp_path):
    with pytest.raises(StageError, match="first of 2.*question 0: not a HotpotQA question .its answer is null"):
        ids(hotpotqa(tmp_path, asked("a", None), asked("b", None)))
    with pytest.raises(StageError, match="locomo.json: nothing in it can be used: c: not a LoCoMo question"):
        ids(locomo(tmp_path, question(None)))
    with pytest.raises(StageError, match="questions.*answers|zip"):
        ids(memory_agent_bench(tmp_path, ["Who?", "Where?"], [["a"]]))
    with pytest.raises(StageError, match="there is no record in it. Fetch the data"):
        ids(hotpotqa(tmp_path, "[]"))
    with pytest.raises(StageError, match="holds an object, not an array of HotpotQA's questions"):
        ids(hotpotqa(tmp_path, "{}"))


def test_files_may_be_gzip_and_those_cut_off_are_named(tmp_path):
    whole = json.dumps([asked()])
    benchmark = hotpotqa(tmp_path, whole)
    path = tmp_path / "hotpot.json"
    path.write_bytes(gzip.compress(whole.encode()))
    assert ids(benchmark) == ["q"]
    path.write_bytes(gzip.compress(whole.encode())[:-12])
    with pytest.raises(StageError, match="hotpot.json: can't be read .the gzip file is cut off"):
        ids(benchmark)
    path.write_text(whole[:-9])
    with pytest.raises(StageError, match="hotpot.json, line 1, column .*cut off"):
        ids(benchmark)
    bench = memory_agent_bench(tmp_path, ["Who?"], [["a"]])
    parquet = tmp_path / "Accurate_Retrieval-00000-of-00001.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(StageError, match="parquet: not a Parquet file of MemoryAgentBench, it can't be read"):
        ids(bench)


def test_records_that_are_read_again_are_noted_once(tmp_path):
    hotpot = hotpotqa(tmp_path, asked("a", None), asked("b"))
    assert ids(hotpot) == ids(hotpot) == ["b"] and len(hotpot.bad_records) == 1
