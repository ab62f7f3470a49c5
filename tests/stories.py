"""A short history with questions about it, for the baselines that shorten histories."""

from pipelines.benchmarks import Context, Question

STORY = [
    "DATE: 1 May\nAnn adopted a grey cat. " + "She likes it a lot. " * 12 + "The cat is called Tiger.",
    "DATE: 2 May\nBo bought a red car.",
    "DATE: 3 May\nAnn and Bo went sailing on the lake.",
]


def context(*asked):
    questions = [
        Question(f"q{n}", "doc", [{"role": "user", "content": f"Answer: {text}"}], ["x"], asked=text)
        for n, text in enumerate(asked)
    ]
    return Context("c", [{"role": "user", "content": text} for text in STORY], questions)


def no_summaries(texts, limit):
    """For a transform that asks for none."""
    raise AssertionError("this method writes no summaries")


def texts(made):
    return [message["content"] for message in made.history]
