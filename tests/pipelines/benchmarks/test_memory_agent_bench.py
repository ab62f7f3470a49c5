"""MemoryAgentBench: its Parquet files, scores and chunks, and the test-time-learning tasks rebuilt."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmarks import Question, get_benchmark
from pipelines.benchmarks.mab_scores import (
    all_parts,
    movie_names,
    parsed_answer,
    recall_at_5,
    substring_match,
    text_scores,
)
from pipelines.benchmarks.mab_sources import SOURCES, clip, source_named
from pipelines.benchmarks.memory_agent_bench import FILES
from pipelines.config.benchmarks import MemoryAgentBenchSettings, TtlSettings
from pipelines.data.chunks import cut_text
from pipelines.errors import StageError
from tests.paths import DATA

needs_data = pytest.mark.skipif(not (DATA / "banking77").exists(), reason="the data sets' own files aren't at hand")

ROWS = {
    "AR": [("ruler_qa1_197K", ["Who?"], [["Ann", "Anna"]]), ("eventqa_full", ["Next?"], [["He left"]])],
    "TTL": [
        ("icl_banking77_5900shot_balance", ["my card?", "a top up?"], [["3"], ["12"]]),
        ("recsys_redial_full", ["a film?"], [["1", "7"]]),
    ],
    "LRU": [("infbench_sum_eng_shots2", ["Sum up."], [["a long summary"]]), ("detective_qa", ["?"], [["B"]])],
    "CR": [("factconsolidation_sh_6k", ["who is it?"], [["Bo"]])],
}
ENTITIES = {
    "<http://dbpedia.org/resource/Get_Out_(2017_film)>": 1,
    "<http://dbpedia.org/resource/Alien>": 7,
    "<http://dbpedia.org/resource/It_Follows>": 3,
    "<http://dbpedia.org/resource/Jaws>": 4,
    "<http://dbpedia.org/resource/Heat>": 5,
    "<http://dbpedia.org/resource/Psycho>": 6,
}


@pytest.fixture
def folder(tmp_path):
    """The benchmark's four files with a few rows in their own columns."""
    for competency, name in FILES.items():
        rows = [
            {
                "context": f"First of {source}.\n\nSecond.",
                "questions": questions,
                "answers": answers,
                "metadata": {"source": source, "qa_pair_ids": [str(i) for i in range(len(questions))]},
            }
            for source, questions, answers in ROWS[competency]
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    (tmp_path / "entity2id.json").write_text(json.dumps(ENTITIES))
    return tmp_path


def benchmark(path, **changes):
    options = {"folder": str(path), "entities": str(path / "entity2id.json"), **changes}
    return get_benchmark("mab", MemoryAgentBenchSettings(kind="memory_agent_bench", version=1, **options))


# --- the benchmark's own files --------------------------------------------------------------------------


def test_every_row_is_a_context_with_its_sources_prompt_length_and_metric(folder):
    contexts = list(benchmark(folder).contexts())
    assert [(c.context_id, c.questions[0].category) for c in contexts] == [
        ("AR/0", "AR/ruler_qa1_197K"),
        ("AR/1", "AR/eventqa_full"),
        ("TTL/0", "TTL/icl_banking77_5900shot_balance"),
        ("TTL/1", "TTL/recsys_redial_full"),
        ("LRU/0", "LRU/infbench_sum_eng_shots2"),
        ("LRU/1", "LRU/detective_qa"),
        ("CR/0", "CR/factconsolidation_sh_6k"),
    ]
    first = contexts[0].questions[0]
    assert first.references == ["Ann", "Anna"]
    assert first.max_new_tokens == 50
    assert first.messages[-1]["content"].endswith("Question: Who? \n\n Answer:")
    assert contexts[0].history == [
        {
            "role": "user",
            "content": "The following context is the documents I have read: \nFirst of ruler_qa1_197K.\n\nSecond.",
        }
    ]
    labels = contexts[2]
    assert [q.question_id for q in labels.questions] == ["TTL/0/0", "TTL/0/1"]
    assert (
        'Only output "label: {label}" and nothing else. \n\nmy card? \n\n label:'
        in (labels.questions[0].messages[-1]["content"])
    )


def test_each_source_is_scored_by_its_own_metric(folder):
    mab = benchmark(folder)
    by_source = {c.questions[0].category.split("/")[1]: c.questions[0] for c in mab.contexts()}
    headline = {
        name: mab.score(by_source[name], prediction)["score"]
        for name, prediction in {
            "ruler_qa1_197K": "I think it was Anna K.",
            "eventqa_full": "then he left.",
            "icl_banking77_5900shot_balance": "label: 3",
            "recsys_redial_full": "1. Alien (1979)\n2. Heat",
            "infbench_sum_eng_shots2": "long summary it is",
            "detective_qa": "Answer: B",
            "factconsolidation_sh_6k": "Bob",  # a substring, even inside a word
        }.items()
    }
    assert headline == {
        "ruler_qa1_197K": 1,
        "eventqa_full": 1,
        "icl_banking77_5900shot_balance": 1,
        "recsys_redial_full": 0.5,
        "infbench_sum_eng_shots2": pytest.approx(2 * 2 / (2 + 4)),
        "detective_qa": 1,
        "factconsolidation_sh_6k": 1,
    }
    assert mab.score(by_source["icl_banking77_5900shot_balance"], "label: 33")["score"] == 0
    assert mab.score(by_source["icl_banking77_5900shot_balance"], "33")["substring_exact_match"] == 1
    everything = set().union(*(mab.score(question, "x") for question in by_source.values()))
    assert everything == set(mab.metrics)


def test_competencies_sources_and_limits_choose(folder):
    chosen = benchmark(folder, competencies=["TTL", "CR"], sources=["factconsolidation_sh_6k"])
    assert [context.context_id for context in chosen.contexts()] == ["CR/0"]
    limited = benchmark(folder, competencies=["TTL"], max_contexts=1, max_questions=1)
    assert [q.question_id for c in limited.contexts() for q in c.questions] == ["TTL/0/0"]


def test_movies_need_the_catalogue_before_anything_is_asked(folder):
    with pytest.raises(StageError, match="TTL/1|recsys_redial_full.*entity2id.json"):
        list(benchmark(folder, entities=None).contexts())
    kept = benchmark(folder, entities=None, competencies=["AR", "CR"])
    assert len(list(kept.contexts())) == 3


def test_what_is_missing_or_something_else_is_named(folder):
    (folder / FILES["CR"]).unlink()
    with pytest.raises(StageError, match="Conflict_Resolution.*no such file"):
        list(benchmark(folder, competencies=["CR"]).contexts())
    (folder / FILES["CR"]).write_text("no Parquet")
    with pytest.raises(StageError, match="Conflict_Resolution.*not a Parquet file"):
        list(benchmark(folder, competencies=["CR"]).contexts())
    with pytest.raises(StageError, match="'weather' is none of MemoryAgentBench's.*icl_"):
        source_named("weather", "here")


def test_no_source_hides_another():
    for source in SOURCES:
        assert source_named(source.prefix + "x", "here") is source
        assert "{question}" in source.query


# --- scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("label: 12", "12"),
        ("Label:12\nlabel: 3", "12"),
        ("12\nand more", "12"),
        ("The answer: Bo\nrest", "Bo"),
        ("Answer: answer: Bo", "Bo"),
        ("", ""),
        ("\n12", ""),  # as in the benchmark, the first line, though it is empty
    ],
)
def test_the_answer_is_found(text, expected):
    assert parsed_answer(text) == expected


@pytest.mark.parametrize(
    "prediction, references, exact, f1, substring",
    [
        ("The Eiffel Tower!", ["Eiffel tower"], 1, 1, 1),
        ("It is the Eiffel Tower", ["x", "Eiffel Tower"], 0, pytest.approx(4 / 6), 1),
        ("Answer: Bo\nnot Ann", ["Bo"], 1, 1, 1),
        ("", ["Bo"], 0, 0, 0),
        ("yes, it was", ["yes"], 0, 0, 1),  # a closed answer has no partial F1
        ("Ünïcode", ["ünïcode"], 1, 1, 1),
        ("13", ["3"], 0, 0, 1),
    ],
)
def test_text_scores_by_hand(prediction, references, exact, f1, substring):
    assert text_scores(prediction, references) == {
        "exact_match": exact,
        "f1": f1,
        "substring_exact_match": substring,
    }


def test_an_event_question_needs_every_part():
    assert all_parts("He LEFT the house", ["left", "house"]) == 1
    assert all_parts("He left", ["left", "house"]) == 0


def test_movies_are_the_nearest_of_the_catalogue():
    names = movie_names(ENTITIES)
    assert names[1] == "Get Out" and names[3] == "It Follows"
    assert recall_at_5("1. get out (2017)\n2. Aliens\n", ["1", "7"], names) == 1
    assert recall_at_5("I suggest Get Out, Alien", ["1", "7", "4"], names) == pytest.approx(2 / 3)
    assert recall_at_5("Get Out, Alien", ["1", "7"], names) == 1
    assert recall_at_5("", ["1"], names) in (0, 1)  # an empty line is some movie, as in the benchmark
    sixth = "1. Jaws\n2. Heat\n3. Psycho\n4. Alien\n5. It Follows\n6. Get Out"
    assert recall_at_5(sixth, ["1"], names) == 0


@given(st.text(max_size=50), st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3))
def test_scores_are_bounded_and_ordered(prediction, references):
    scores = text_scores(prediction, references)
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["exact_match"] <= scores["substring_exact_match"]


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_a_reference_is_found_in_an_answer_that_has_it(before, reference, after):
    assert substring_match(f"{before} {reference} {after}", reference) == 1


# --- chunks ---------------------------------------------------------------------------------------------


@given(
    st.text(alphabet="abc .\n", max_size=300).map(lambda text: text.replace(" .", ". ")),
    st.integers(min_value=1, max_value=60),
)
def test_chunks_are_short_enough_and_lose_nothing_but_white_space(text, longest):
    pieces = cut_text(text, longest)
    assert all(0 < len(piece) <= longest and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_chunks_end_where_a_reader_would_stop():
    text = "One.\nTwo.\n\nThree is. A long one"
    assert cut_text(text, 100) == [text]
    assert cut_text(text, 15) == ["One.\nTwo.", "Three is.", "A long one"]
    assert cut_text("One.\nTwo.", 6) == ["One.", "Two."]
    assert cut_text("abcdef", 4) == ["abcd", "ef"]


# --- test-time learning, rebuilt ------------------------------------------------------------------------


def ttl(**changes):
    options = {"shots": 4, "questions": 2, "contexts": 2, **changes}
    return get_benchmark("ttl", TtlSettings(kind="test_time_learning", version=1, **options))


@pytest.fixture
def banking(tmp_path):
    """Three labels, one of them with a single example; a text with a comma, a quote and a line break."""
    rows = ['"Where, my ""card""?\nNow",card', "Lost card,card", "Cash?,cash", "Top up?,top", "More top,top"]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,category\n" + "\n".join(rows) + "\n")
    return {
        "dataset": "banking77",
        "train_file": str(tmp_path / "train.csv"),
        "test_file": str(tmp_path / "test.csv"),
    }


def mapping(context):
    """{text: number} as the history teaches it."""
    body = "\n\n".join(message["content"].split(" \n", 1)[1] for message in context.history)
    return dict(example.rsplit("\nlabel: ", 1) for example in body.split("\n\n"))


def test_a_context_teaches_one_number_per_label(banking):
    contexts = list(ttl(**banking, shots=6).contexts())
    taught = [mapping(context) for context in contexts]
    assert len(contexts) == 2
    for context, numbers in zip(contexts, taught, strict=True):
        assert set(numbers) == {'Where, my "card"?\nNow', "Lost card", "Cash?", "Top up?", "More top"}
        assert numbers["Lost card"] == numbers['Where, my "card"?\nNow']
        assert numbers["Top up?"] == numbers["More top"]
        assert set(numbers.values()) == {"0", "1", "2"}
        for question in context.questions:
            assert question.cluster_id == context.context_id
            text = question.messages[-1]["content"].split("nothing else. \n\n")[1].removesuffix(" \n\n label:")
            assert question.references == [numbers[text]]
    assert len({q.question_id for c in contexts for q in c.questions}) == 4


def test_examples_are_balanced_and_drawn_by_the_seed(banking):
    (context,) = ttl(**banking, shots=9, contexts=1).contexts()
    body = context.history[0]["content"]
    assert Counter(line for line in body.split("\n") if line.startswith("label: ")) == {
        "label: 0": 3,
        "label: 1": 3,
        "label: 2": 3,
    }
    again, other = (list(ttl(**banking, seed=seed).contexts()) for seed in (42, 43))
    assert list(ttl(**banking).contexts()) == again != other


def test_only_the_number_counts(banking):
    learning = ttl(**banking)
    question = Question("q", "c", [], ["3"])
    for prediction, score in {
        "3": 1,
        "label: 3": 1,
        "label:3\nlabel: 4": 1,
        "13": 0,
        "three": 0,
        "": 0,
    }.items():
        assert learning.score(question, prediction) == {"exact_match": score}


def test_original_files_of_all_four(tmp_path):
    clinc = {
        "train": [["hi", "greet"]],
        "val": [["hello", "greet"]],
        "test": [],
        "oos_train": [["???", "oos"]],
        "oos_val": [["!?", "oos"]],
        "oos_test": [],
    }
    (tmp_path / "c.json").write_text(json.dumps(clinc))
    (context,) = ttl(dataset="clinc150", train_file=str(tmp_path / "c.json"), contexts=1).contexts()
    assert set(mapping(context)) == {"hi", "???"}
    trec = tmp_path / "t.label"
    trec.write_bytes("DESC:manner How did it ?\nENTY:animal What sister\xadcity ?\n".encode("latin-1"))
    files = {"train_file": str(trec), "test_file": str(trec)}
    for dataset in ("trec_coarse", "trec_fine"):
        (context,) = ttl(dataset=dataset, contexts=1, **files).contexts()
        assert set(mapping(context)) == {"How did it ?", "What sister\xadcity ?"}
    numbers = tmp_path / "n.all"
    numbers.write_text("0 How did it ?\n1 What animal ?\n")
    files = {"train_file": str(numbers), "test_file": str(numbers)}
    assert len(list(ttl(dataset="trec_coarse", **files).contexts())) == 2
    with pytest.raises(StageError, match="no fine labels"):
        list(ttl(dataset="trec_fine", **files).contexts())


def test_files_that_do_not_go_together_are_named(banking, tmp_path):
    (tmp_path / "test.csv").write_text("text,category\nHm?,unheard\n")
    with pytest.raises(StageError, match="unheard have no example"):
        list(ttl(**banking).contexts())
    with pytest.raises(StageError, match="test_file is missing"):
        list(ttl(**banking | {"test_file": None}).contexts())
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StageError, match="train.csv: not banking77's"):
        list(ttl(**banking).contexts())
    (tmp_path / "train.csv").write_text("text,category\n")
    with pytest.raises(StageError, match="no record in it"):
        list(ttl(**banking).contexts())


@needs_data
@pytest.mark.parametrize(
    "dataset, train, test, labels",
    [
        ("banking77", "banking77/train.csv", "banking77/test.csv", 77),
        ("clinc150", "clinc150/data_full.json", None, 151),
        ("trec_coarse", "trec_qc/TREC.train.all", "trec_qc/TREC.test.all", 6),
    ],
)
def test_the_real_files(dataset, train, test, labels):
    files = {"train_file": str(DATA / train), "test_file": test and str(DATA / test)}
    learning = ttl(dataset=dataset, **files, shots=2 * labels, questions=10, contexts=1)
    (context,) = learning.contexts()
    assert set(mapping(context).values()) == {str(number) for number in range(labels)}
    assert all(learning.score(q, f"label: {q.references[0]}")["exact_match"] for q in context.questions)


# --- as the public release asks it -----------------------------------------------------------------------


def test_the_release_asks_every_source_in_the_same_words_about_one_message(folder):
    official, release = (list(benchmark(folder, protocol=name).contexts()) for name in ("official", "release"))
    for ours, theirs in zip(official, release, strict=True):
        assert theirs.context_id == ours.context_id
        (message,) = theirs.history
        assert message["role"] == "user" and message["content"].startswith("First of ")
        for question, other in zip(ours.questions, theirs.questions, strict=True):
            (asked,) = other.messages
            assert asked["content"].startswith("Answer from the memory context above") and asked["role"] == "user"
            assert asked["content"].endswith(f"Question: {question.asked}\nAnswer:")
            assert (other.max_new_tokens, other.references) == (question.max_new_tokens, question.references)
            assert other.query == question.query


def test_to_the_release_an_answer_is_right_that_has_a_reference_in_it(folder):
    mab = benchmark(folder, protocol="release")
    by_source = {c.questions[0].category.split("/")[1]: c.questions[0] for c in mab.contexts()}
    found = {
        name: mab.score(by_source[name], prediction)["score"]
        for name, prediction in {
            "ruler_qa1_197K": "It was Anna.",
            "eventqa_full": "He stayed",
            "icl_banking77_5900shot_balance": "label: 13",  # wrong, but a 3 is in it
            "infbench_sum_eng_shots2": "a long story",
            "recsys_redial_full": "1.Get Out\n2.Alien",
        }.items()
    }
    assert found == {
        "ruler_qa1_197K": 1,
        "eventqa_full": 0,
        "icl_banking77_5900shot_balance": 1,
        "infbench_sum_eng_shots2": pytest.approx(1 / 2),
        "recsys_redial_full": 1,
    }


@pytest.mark.parametrize("length", [119_999, 120_000, 120_001, 500_000])
def test_the_release_keeps_the_first_third_and_the_last_two(length):
    text = "".join(chr(ord("a") + number % 26) for number in range(length))
    kept = clip(text)
    assert len(kept) == min(length, 120_000)
    if length > 120_000:
        head, mark, tail = kept.partition("\n\n[a part of the context is left out here]\n\n")
        assert mark and text.startswith(head) and text.endswith(tail) and len(tail) - 2 * len(head) in range(3)
    else:
        assert kept == text
