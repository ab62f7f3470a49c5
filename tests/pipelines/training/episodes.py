"""Episodes as the preprocess stage leaves them, of small numbers instead of a tokenizer's."""

import pyarrow as pa

from pipelines.data.shards import SCHEMA


def episodes(questions_per_paper, width=lambda paper: 5, source=lambda paper: "papers", weights=None):
    rows = []
    for paper, count in enumerate(questions_per_paper):
        context = list(range(3, 3 + width(paper)))
        for question in range(count):
            rows.append({
                "paper_id": f"p{paper}", "question_id": f"p{paper}q{question}", "context_ids": context,
                "segment_ids": [0] * len(context), "messages": [], "question": "?",
                "question_ids": [7] * (question + 1), "answer": "!", "answer_ids": [8, 9][: 1 + question % 2],
                "answer_type": "extractive", "references": ["!"],
                "source": source(paper), "prompt": [{"role": "user", "content": "?"}],
                "answer_weights": weights and weights[: 1 + question % 2],
            })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)
