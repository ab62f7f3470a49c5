"""TweetQA: a tweet with its questions, and what becomes of bad records."""

import json

import pytest

from pipelines.config.data import TweetqaSource
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError
from tests.paths import DATA


def record(qid, tweet="Rain in W NJ today.", question="where?", answers=("nj", "w nj", "nj")):
    return {"Question": question, "Answer": list(answers), "Tweet": tweet, "qid": qid}


@pytest.fixture
def load(tmp_path):
    def load(*records):
        path = tmp_path / "tweets.json"
        path.write_text(json.dumps(list(records)))
        settings = TweetqaSource(kind="tweetqa", train_files=[str(path)], eval_files=[str(path)])
        return load_corpus(settings, "train", tmp_path)

    return load


def test_the_questions_about_a_tweet_share_its_write(load):
    first, second = load(record("1"), record("2", tweet="Snow."), record("3", question="when?")).documents
    assert first.messages == [{"role": "user", "content": "Rain in W NJ today."}]
    assert [exercise.question_id for exercise in first.exercises] == ["1", "3"]
    assert first.exercises[0].references == ["nj", "w nj"]
    assert second.document_id == "2"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("1", answers=["", " "]), "its answers are empty"),
        (record("1", answers=[]), "it has no answers"),
        (record("1", question=" "), "the question is empty"),
        (record("1", tweet=""), "the tweet is empty"),
        (record("1") | {"Answer": "nj"}, "Answer: Input should be a valid list"),
        (record("1") | {"Answer": [None]}, "Answer.0: Input should be a valid string"),
        ({"Question": "where?", "Tweet": "x", "qid": "1"}, "Answer: Field required"),
    ],
)
def test_a_bad_record_is_reported_and_the_others_kept(load, bad, reason):
    corpus = load(bad, record("2"))
    assert [d.document_id for d in corpus.documents] == ["2"]
    (found,) = corpus.bad_records
    assert (found.lost, found.question_id) == ("question", "1") and reason in found.reason


def test_repeated_ids_and_half_characters_are_kept_and_named(load):
    corpus = load(record("1"), record("1", tweet="x \ud83d"))
    assert corpus.renamed_questions == ["1-2"] and corpus.renamed_documents == ["1-2"]
    assert [(b.lost, b.paper_id) for b in corpus.bad_records] == [("characters", "1")]


@pytest.mark.parametrize(
    ("content", "said"),
    [({"data": []}, "holds an object; expected TweetQA's JSON"), ([3], "the first of 1 bad records: record 0: ")],
)
def test_a_file_that_is_not_tweetqa_is_named(tmp_path, content, said):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match=f"other.json: .*{said}"):
        load_corpus(TweetqaSource(kind="tweetqa", train_files=[str(path)]), "train", tmp_path)


@pytest.mark.skipif(not (DATA / "tweetqa").exists(), reason="TweetQA is not at hand")
def test_the_real_files_are_read_whole(tmp_path):
    files = {
        name: [str(DATA / "tweetqa" / f"{file}.json.gz")]
        for name, file in (("train_files", "train"), ("eval_files", "dev"))
    }
    settings = TweetqaSource(kind="tweetqa", **files)
    train, held_out = (load_corpus(settings, split, tmp_path) for split in ("train", "eval"))
    assert train.questions + len(train.bad_records) == 10692 and len(train.bad_records) < 10
    assert held_out.questions == 1086
