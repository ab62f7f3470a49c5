"""Question answering under controlled conditions.

One adapter answers the same questions under several conditions, so that what it remembers can be told from
what it merely got used to:

| condition  | prompt             | memory                                                                       |
|------------|--------------------|------------------------------------------------------------------------------|
| none       | question           | empty                                                                        |
| state      | question           | written from the right history                                               |
| swapped    | question           | written from the history of another document (see ``swap``)                  |
| unrelated  | question           | written from as much text of an unrelated corpus (see ``swap``)              |
| permuted   | question           | written from the right history, each layer's state given to the next layer   |
| strength_0 | question           | written from the right history, steering nothing: the frozen backbone        |
| strength_2 | question           | written from the right history, steering twice as much as trained            |
| full       | history + question | written from the history as it is read, the setting of the paper             |

``pipelines.config.conditions`` is the table that the code goes by; ``unrelated``, ``permuted`` and the two
strengths are asked only where a configuration names them.

Under all conditions but full the question and the answer are read only: nothing is written, so that the
conditions differ in what the memory holds at the start and in nothing else. An empty memory adds nothing,
which makes ``none`` the frozen backbone with the question alone, to the bit what ``strength_0`` says. Benchmarks
of chats (``writes_questions``) write question and answer as they are read, under every condition.

Under full everything is written as it is read, as in the paper: the history in one pass, the question in the
next, then the answer token by token. The frozen backbone is evaluated under none and full, as a strategy of the
name ``frozen``.

For each question and condition there are the mean negative log-likelihood per token of the first reference,
given token by token with its end of turn, and a greedy answer, scored by the benchmark's own metrics.

A prompt that doesn't fit the backbone's window loses messages of the history; the memory still gets all of
them, those left out of the prompt written by themselves in the order of the history.
"""
