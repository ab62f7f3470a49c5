"""Generated papers: in the official form, true to themselves, and impossible to guess."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from pipelines.config import Generated
from pipelines.data.generate import PROPERTIES, generate_papers
from pipelines.data.papers import parse_papers
from pipelines.errors import StageError

SETTINGS = Generated(train_papers=60, eval_papers=40, facts_per_paper=6, seed=3)
FACT = re.compile(r"The ([a-z ]+) of ([A-Z][a-z]+) is (\w+)\.")


def text_of(record):
    return " ".join(p for section in record["full_text"] for p in section["paragraphs"])


def facts(papers):
    return [fact for record in papers.values() for fact in FACT.findall(text_of(record))]


def test_it_is_official_and_every_record_is_usable():
    records = json.loads(json.dumps(generate_papers("train", SETTINGS)))
    papers, bad = parse_papers(records.items())
    assert not bad
    assert len(papers) == 60
    assert all(len(paper.questions) == 7 for paper in papers)
    assert Counter(q.answers[0].kind for p in papers for q in p.questions) == {
        "extractive": 360,
        "yes_no": 30,
        "unanswerable": 30,
    }


@pytest.mark.parametrize("facts_per_paper", [1, 2, 5, 6, 7, 13])
def test_answers_follow_from_the_paper(facts_per_paper):
    records = generate_papers("eval", Generated(eval_papers=30, facts_per_paper=facts_per_paper))
    for record in records.values():
        told = {(name, system): value for name, system, value in FACT.findall(text_of(record))}
        assert len(told) == facts_per_paper
        asked = set()
        for item in record["qas"]:
            answer = item["answers"][0]["answer"]
            assert all(sentence in text_of(record) for sentence in answer["evidence"])
            if answer["yes_no"] is not None:
                name, system, value = re.fullmatch(r"Is the (.+) of (\w+) (\w+)\?", item["question"]).groups()
                assert answer["yes_no"] == (told[name, system] == value)
                assert value in PROPERTIES[name]
                continue
            key = re.fullmatch(r"What is the (.+) of (\w+)\?", item["question"]).groups()
            if answer["unanswerable"]:
                assert key not in told
                assert key[1] in text_of(record)
            else:
                assert answer["extractive_spans"] == [told[key]]
                asked.add(key)
        assert asked == set(told)


def test_no_system_occurs_in_two_papers():
    many = Generated(train_papers=2000, eval_papers=2000, facts_per_paper=1)
    systems = [system for split in ("train", "eval") for _, system, _ in facts(generate_papers(split, many))]
    assert len(systems) == len(set(systems)) == 4000


def test_no_value_can_be_guessed():
    papers = generate_papers("train", Generated(train_papers=1000))
    found = facts(papers)
    values = {name: Counter(v for n, _, v in found if n == name) for name in PROPERTIES}
    for name, counts in values.items():
        assert set(counts) == set(PROPERTIES[name])
        assert counts.most_common(1)[0][1] / counts.total() < 1.6 / len(PROPERTIES[name])
    answers = [item["answers"][0]["answer"]["yes_no"] for record in papers.values() for item in record["qas"]]
    assert 0.4 < answers.count(True) / (answers.count(True) + answers.count(False)) < 0.6


def test_values_are_distinct_single_words():
    words = [value for values in PROPERTIES.values() for value in values]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"[A-Za-z]+", word) for word in words)
    assert min(map(len, PROPERTIES.values())) >= 12


def test_seeded():
    assert generate_papers("train", SETTINGS) == generate_papers("train", SETTINGS)
    other = SETTINGS.model_copy(update={"seed": 4})
    assert facts(generate_papers("train", SETTINGS)) != facts(generate_papers("train", other))


def test_evaluation_does_not_depend_on_the_number_of_training_papers():
    more = SETTINGS.model_copy(update={"train_papers": 200})
    assert generate_papers("eval", SETTINGS) == generate_papers("eval", more)


def test_more_systems_than_names():
    with pytest.raises(StageError, match="data.generated: .*lower train_papers"):
        generate_papers("train", Generated(train_papers=200_000))


def test_a_file_of_papers_is_the_generator_s(tmp_path):
    file = tmp_path / "made" / "papers.json"
    command = [
        sys.executable,
        "-m",
        "pipelines.data.generate",
        str(file),
        "--papers",
        "3",
        "--facts",
        "2",
        "--seed",
        "7",
    ]
    subprocess.run(command, check=True)
    settings = Generated(train_papers=3, facts_per_paper=2, seed=7)
    assert json.loads(file.read_text(encoding="utf-8")) == generate_papers("train", settings)
