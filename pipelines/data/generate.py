"""Papers in QASPER's official form whose facts can't be guessed, for machines without network.

Every paper is about an invented system and tells its properties ("The codename of Velmora is otter."). A
name occurs in one paper only and every value is drawn by itself, so nothing but having read the paper helps
to answer better than by chance, 1 in 12 to 16. Values are single words from closed lists, one or two tokens
for common tokenizers, which keeps learning to remember them possible within minutes on a CPU.

``python -m pipelines.data.generate FILE`` writes a file of them, to train on beside others.
"""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.config import Generated
from pipelines.data.documents import Split
from pipelines.data.draw import pick, shuffled
from pipelines.errors import StageError, run_stage
from pipelines.run.files import room_to_write

PROPERTIES: Mapping[str, Sequence[str]] = {
    "colour": (
        "red blue green yellow black white purple orange pink brown gray violet turquoise scarlet beige silver"
    ).split(),
    "codename": ("cat dog horse bear wolf fox lion tiger eagle shark whale rabbit snake monkey elephant owl").split(),
    "home city": (
        "Paris London Tokyo Berlin Rome Madrid Moscow Delhi Cairo Boston Chicago Toronto Vienna Athens Oslo Lima"
    ).split(),
    "material": (
        "steel wood glass copper plastic paper iron cotton leather stone rubber concrete silk wool clay brick"
    ).split(),
    "password": (
        "apple banana cherry grape lemon mango peach pear plum melon fig olive pineapple lime kiwi berry"
    ).split(),
    "theme": (
        "football tennis golf hockey chess rugby boxing swimming skiing cycling rowing baseball surfing "
        "running sailing climbing"
    ).split(),
    "callsign": (
        "car train bus boat truck plane bicycle ship canoe taxi tram sled rocket motorcycle van wagon"
    ).split(),
    "launch month": ("January February March April May June July August September October November December").split(),
}
FACTS_PER_SYSTEM = 6
"""Fewer than there are properties, so that every system leaves some unsaid for unanswerable questions."""
FACTS_PER_SECTION = 2
MOST_SYSTEMS = 150_000
"""Under half of the names that the syllables give, so that a new one is found quickly."""

_SECTIONS = ("Overview", "Design", "History", "Methods", "Setup", "Trials", "Results", "Discussion", "Notes")
FILLERS = (
    "This was settled early.",
    "Nobody objected.",
    "The team agreed.",
    "It took a week.",
    "A vote was held.",
    "The reasons were not recorded.",
    "It has not changed since.",
    "Visitors often ask.",
)
_ONSETS = "b d f g k l m n p r s t v z".split()
_VOWELS = "a e i o u".split()


def generate_papers(split: Split, settings: Generated) -> dict[str, Any]:
    """{paper id: official record} of one split; the same for the same settings on every Python version.

    The evaluation papers don't depend on the number of training papers. No system occurs in both splits.
    Raises StageError if there are too few names for so many systems.
    """
    return dict(_drawn(split, settings))


def write_papers(path: Path, split: Split, settings: Generated) -> None:
    """Writes them to a file, in QASPER's official form, with one paper at a time in memory."""
    with path.open("w", encoding="utf-8") as file:
        before = "{"
        for paper_id, record in _drawn(split, settings):
            text = json.dumps(record, indent=1).replace("\n", "\n ")
            file.write(f"{before}\n {json.dumps(paper_id)}: {text}")
            before = ","
        file.write("\n}\n")


def _drawn(split: Split, settings: Generated) -> Iterator[tuple[str, dict[str, Any]]]:
    counts = (settings.train_papers, settings.eval_papers)
    systems = sum(_systems_per_paper(_facts(settings, number)) for count in counts for number in range(count))
    if systems > MOST_SYSTEMS:
        raise StageError(
            f"data.generated: so many papers and facts need names for {systems} invented systems, and "
            f"there are {MOST_SYSTEMS}; lower train_papers, eval_papers or facts_per_paper"
        )
    taken: set[str] = set()
    held_out = _papers("eval", settings.eval_papers, settings, taken)
    if split == "eval":
        yield from held_out
    else:
        deque(held_out, maxlen=0)  # for the names that they take
        yield from _papers("train", settings.train_papers, settings, taken)


def _papers(split: Split, count: int, settings: Generated, taken: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = random.Random(f"{settings.seed}/{split}")
    for number in range(count):
        paper_id = f"generated-{settings.seed}-{split}-{number:05d}"
        yield paper_id, _paper(rng, paper_id, _facts(settings, number), taken, yes_no=bool(number % 2))


def _facts(settings: Generated, number: int) -> int:
    """How many facts the paper of a number has."""
    facts = settings.facts_per_paper
    return facts if isinstance(facts, int) else facts[number % len(facts)]


def _paper(rng: random.Random, paper_id: str, facts: int, taken: set[str], yes_no: bool) -> dict[str, Any]:
    """One paper: a question on every fact, and one more that is yes/no or unanswerable in turns."""
    systems = [_new_name(rng, taken) for _ in range(_systems_per_paper(facts))]
    said = {system: shuffled(rng, PROPERTIES)[:FACTS_PER_SYSTEM] for system in systems}
    told = [(system, name, pick(rng, PROPERTIES[name])) for system in systems for name in said[system]][:facts]

    sections = []
    questions = []
    section_names = shuffled(rng, _SECTIONS)
    for number, start in enumerate(range(0, facts, FACTS_PER_SECTION)):
        group = told[start : start + FACTS_PER_SECTION]
        sentences = [f"The {name} of {system} is {value}." for system, name, value in group]
        sections.append(
            {
                "section_name": section_names[number % len(section_names)],
                "paragraphs": [" ".join([*sentences, pick(rng, FILLERS)])],
            }
        )
        questions += [
            (f"What is the {name} of {system}?", {"extractive_spans": [value], "evidence": [sentence]})
            for (system, name, value), sentence in zip(group, sentences, strict=True)
        ]
    questions.append(_yes_no_question(rng, told) if yes_no else _unanswerable_question(rng, told))
    return {
        "title": f"A report on {' and '.join(systems)}",
        "abstract": "",
        "full_text": sections,
        "qas": [_question(f"{paper_id}-q{n}", text, fields) for n, (text, fields) in enumerate(questions)],
        "figures_and_tables": [],
    }


def _yes_no_question(rng: random.Random, told: list[tuple[str, str, str]]) -> tuple[str, dict[str, Any]]:
    system, name, value = pick(rng, told)
    truth = rng.random() < 0.5
    asked = value if truth else pick(rng, [other for other in PROPERTIES[name] if other != value])
    evidence = [f"The {name} of {system} is {value}."]
    return f"Is the {name} of {system} {asked}?", {"yes_no": truth, "evidence": evidence}


def _unanswerable_question(rng: random.Random, told: list[tuple[str, str, str]]) -> tuple[str, dict[str, Any]]:
    system = pick(rng, told)[0]
    said = {name for other, name, _ in told if other == system}
    name = pick(rng, [name for name in PROPERTIES if name not in said])
    return f"What is the {name} of {system}?", {"unanswerable": True}


def _question(question_id: str, text: str, fields: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "unanswerable": False,
        "extractive_spans": [],
        "yes_no": None,
        "free_form_answer": "",
        "evidence": [],
    }
    answer |= fields
    return {
        "question": text,
        "question_id": question_id,
        "nlp_background": "",
        "topic_background": "",
        "paper_read": "",
        "search_query": "",
        "question_writer": "generator",
        "answers": [
            {
                "answer": answer | {"highlighted_evidence": answer["evidence"]},
                "annotation_id": f"{question_id}-a0",
                "worker_id": "generator",
            }
        ],
    }


def _systems_per_paper(facts: int) -> int:
    return math.ceil(facts / FACTS_PER_SYSTEM)


def _new_name(rng: random.Random, taken: set[str]) -> str:
    while True:
        name = "".join(pick(rng, letters) for letters in (_ONSETS, _VOWELS) * 3).capitalize()
        if name not in taken:
            taken.add(name)
            return name


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="Written anew, in QASPER's official form.")],
    papers: Annotated[int, typer.Option(min=1)] = 1000,
    facts: Annotated[int, typer.Option(min=1, help="Facts in a paper.")] = 2,
    seed: int = 0,
) -> None:
    """Write generated papers to a file, for data.train_files or data.eval_files."""
    settings = Generated(train_papers=papers, facts_per_paper=facts, seed=seed)
    with room_to_write(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_papers(file, "train", settings)


if __name__ == "__main__":
    run_stage(app)
