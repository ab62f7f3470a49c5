"""MemoryAgentBench's sources: what each asks, how long an answer may be, and which score counts.

The words are those of the benchmark's own templates for agents with a long context
(``utils/templates.py``), the lengths those of its data configurations. Each chunk of a context is
introduced by the source's ``intro``; the acknowledgement and the time stamp that the templates put around a
chunk are left out, because they would be written to the memory as if they were part of the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.errors import StageError

SYSTEM = "You are a helpful assistant that can read the context and memorize it for future retrieval."

Metric = Literal["substring_exact_match", "exact_match", "f1", "all_parts", "recall_at_5"]


@dataclass(frozen=True)
class Source:
    """A family of sources.

    Attributes:
        prefix: how the names of its sources begin in the data.
        intro: goes before each chunk of the context.
        query: the question, with ``{question}``.
        max_new_tokens: of an answer.
        metric: the score that counts.
    """

    prefix: str
    intro: str
    query: str
    max_new_tokens: int
    metric: Metric

    def ask(self, question: str) -> str:
        # not str.format: the query of a classification task tells the model to write "label: {label}"
        return self.query.replace("{question}", question)


CLASSIFICATION = Source(
    "icl_",
    "The following context is the examples I have learned: \n",
    "Use the provided mapping from the context to numerical label to assign a numerical label to the "
    'context. Only output "label: {label}" and nothing else. \n\n{question} \n\n label:',
    20,
    "exact_match",
)

SOURCES = [
    Source(
        "ruler_qa",
        "The following context is the documents I have read: \n",
        "Answer the question based on the memorized documents. Only give me the answer and do not output "
        "any other words. \n\nQuestion: {question} \n\n Answer:",
        50,
        "substring_exact_match",
    ),
    # The authors have a GPT-4o judge say whether an answer is right; no judge is at hand here.
    Source(
        "longmemeval_",
        "The following context is the conversation between the user and the assistant: \n",
        "The history chats are between you and a user. Based on the relevant chat history, answer the "
        "question as concisely as you can, using a single phrase if possible.\n\n {question} \n\n Answer:",
        50,
        "substring_exact_match",
    ),
    Source(
        "eventqa_",
        "The following context is the book excerpt: \n",
        "Based on the context you memorized, complete the task below:\n\n{question}\n\n The event that "
        "happens next is:",
        40,
        "all_parts",
    ),
    CLASSIFICATION,
    Source(
        "recsys_redial",
        "The following context is the dialogues between a user and recommender system: \n",
        "Pretend you are a movie recommender system. You need to recommend movies based on the dialogues "
        "you have memorized. Now I will give you a new conversation between a user and you (a recommender "
        "system). Based on the conversation, you reply me with 20 recommendations without extra "
        "sentences. \n\nFor Example:\n\n"
        "[Conversation]\n\nThe recommendations are: \n1.movie1\n2.movie2\n...\n\n Here is the "
        "conversation: {question} \n\n The recommendations are: \n",
        300,
        "recall_at_5",
    ),
    # The authors have a judge compare a summary with key points; the F1 of tokens stands in for it.
    Source(
        "infbench_sum",
        "The following context is the book I have read: \n",
        "You are given a book above and you are tasked to summarize it. \n\n{question} \n\n Now summarize the book.",
        1200,
        "f1",
    ),
    Source(
        "detective_qa",
        "The following context is the book I have read: \n",
        "Based on the context you memorized, answer the question below. You are required to answer the "
        "question based on the strict output format.\n\n {question} \n\n",
        2000,
        "substring_exact_match",
    ),
    Source(
        "factconsolidation_",
        "The following context is the facts I have learned: \n",
        "Pretend you are a knowledge management system. Each fact in the knowledge pool is provided with "
        "a serial number at the beginning, and the newer fact has larger serial number. \n You need to "
        "solve the conflicts of facts in the knowledge pool by finding the newest fact with larger serial "
        "number. You need to answer a question based on this rule. You should give a very concise answer "
        "without saying other words for the question **only** from the knowledge pool you have memorized "
        "rather than the real facts in real world. \n\n"
        "For example:\n\n [Knowledge Pool] \n\n Question: Based on the provided Knowledge Pool, what is "
        "the name of the current president of Russia? \nAnswer: Donald Trump \n\n Now Answer the "
        "Question: Based on the provided Knowledge Pool, {question} \nAnswer:",
        10,
        "substring_exact_match",
    ),
]


RELEASE_CHARACTERS = 120_000
"""Length to which δ-mem's public release cuts a context (arXiv 2605.12357's repository, its evaluation script)."""
RELEASE_QUERY = (
    "Answer from the memory context above and from nothing else.\n"
    "Be short: an entity, a phrase, a number or one sentence.\n"
    "Where the context doesn't tell, say exactly: I don't know.\n\n"
    "Question: {}\nAnswer:"
)
"""What the release asks of every source, in our words; there the instruction comes before the context."""
_CUT = "\n\n[a part of the context is left out here]\n\n"


def clip(context: str, longest: int = RELEASE_CHARACTERS) -> str:
    """A context as the public release cuts it: its first third and its last two thirds, with a mark between them."""
    if len(context) <= longest:
        return context
    head = (longest - len(_CUT)) // 3
    return context[:head].rstrip() + _CUT + context[len(context) - (longest - len(_CUT) - head) :].lstrip()


def source_named(name: str, where: str) -> Source:
    """The family that a source's name in the data belongs to. Raises StageError for an unknown one."""
    for source in SOURCES:
        if name.startswith(source.prefix):
            return source
    known = ", ".join(source.prefix + "…" for source in SOURCES)
    raise StageError(
        f"{where}: the source {name!r} is none of MemoryAgentBench's ({known}). Leave it out with 'sources'."
    )
