"""Sessions beside plain generate: `python -m benchmarks.serving --help`.

Two questions. What does a turn of a resumed session cost, whose history is in its saved cache, against
reading the whole prompt again? And how fast do 1 and 8 sessions decode, against transformers' own ``generate``
on the backbone and on the δ-mem model at the same batch and context? "Whole turns" are the server's scheduler with
its prompts and its saving to disk.
"""

from __future__ import annotations

import queue
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.measure import median_seconds, report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, backbone_of, known_shapes
from deltamem import ChatSession, DeltaMemConfig, get_delta_mem_model
from deltamem.chat.batch import Batch
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.turn import Turn, TurnOptions, choose
from deltamem.server.metrics import Metrics
from deltamem.server.scheduler import Finished, Job, TurnScheduler
from deltamem.server.store import SessionStore, StoreLimits
from deltamem.tools.throughput import TokenClock
from pipelines.backbones.random_weights import byte_tokenizer

NAME = "served"


def main(
    base: Annotated[str | None, typer.Option(help="backbone folder; its weights don't matter for time")] = None,
    shape: Annotated[str, typer.Option(callback=known_shapes, help=f"without --base: {SHAPE_NAMES}")] = "tiny",
    strategy: Annotated[str, typer.Option(help="tsw, ssw or msw")] = "tsw",
    context: Annotated[int, typer.Option(help="tokens of history before the turn that is timed")] = 1024,
    tokens: Annotated[int, typer.Option(help="tokens decoded per reply")] = 64,
    sessions: Annotated[list[int], typer.Option(help="sessions at once")] = [1, 8],  # noqa: B006
    repeats: int = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Seconds to the first token of a resumed session, and tokens per second of concurrent sessions."""
    place, kind = torch.device(device), getattr(torch, dtype)
    backbone = backbone_of(base, shape, place, kind)
    tokenizer = byte_tokenizer() if base is None else AutoTokenizer.from_pretrained(base)
    model = get_delta_mem_model(backbone, DeltaMemConfig(strategy=strategy)).requires_grad_(False).to(kind).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = _rows(model, tokenizer, context, tokens, sessions, repeats, place, Path(folder))
        report(rows, f"Sessions on {base or shape}, {strategy}, {context} tokens of history", place, out)


def _rows(model, tokenizer, context, tokens, sessions, repeats, place, folder):
    for count in sessions:
        yield from _generate(model, context, tokens, count, repeats, place)
        yield _decoded(model, tokenizer, context, tokens, count, repeats)
    yield from _resumed(model, tokenizer, context, folder / "session", repeats, place)
    for count in sessions:
        yield _served(model, tokenizer, context, tokens, count, folder / f"store{count}")


def _history(tokenizer, length: int) -> str:
    """Words that make about ``length`` tokens."""
    word = len(tokenizer("word " * 100, add_special_tokens=False).input_ids) / 100
    return "word " * round(length / word)


def _resumed(model, tokenizer, context, folder, repeats, place):
    chat = ChatSession(model, tokenizer)
    chat.send(_history(tokenizer, context), max_new_tokens=2)
    chat.save(folder)
    question = [{"role": "user", "content": "And what now?"}]
    restored = ChatSession.load(model, tokenizer, folder)
    fed = []
    hook = model.base_model.get_input_embeddings().register_forward_hook(
        lambda m, args, y: fed.append(args[0].shape[1])
    )

    def first_token(state, messages):
        Turn(restored.runtime, state, messages, TurnOptions()).prefill()

    scratch = restored.runtime.new_state()
    for what, function in {
        "restore from disk": lambda: ChatSession.load(model, tokenizer, folder),
        "first token, resumed": lambda: first_token(restored.state, question),
        "first token, from scratch": lambda: first_token(scratch, [*restored.messages, *question]),
    }.items():
        fed.clear()
        seconds = median_seconds(function, place, repeats, 1)
        yield {"what": what, "sessions": 1, "tokens read": sum(fed) // (repeats + 1), "seconds": seconds}
    hook.remove()


def _generate(model, context, tokens, batch, repeats, place):
    """Tokens per second after the first token, which is the prompt's."""
    vocabulary = model.base_model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (batch, context), device=place)
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    segments = {"segment_ids": torch.zeros_like(ids)} if model.config.strategy == "ssw" else {}
    for name, generate, more in (
        ("generate, backbone alone", model.base_model.generate, {}),
        ("generate, δ-mem", model.generate, segments),
    ):
        seconds = []
        for _ in range(repeats):
            clock = TokenClock(place)
            generate(ids, max_new_tokens=tokens, stopping_criteria=[clock], **fixed, **more)
            seconds.append(clock.times[-1] - clock.times[1])
        rate = batch * (tokens - 1) / statistics.median(seconds)
        yield {"what": name, "sessions": batch, "tokens/s": rate}


def _decoded(model, tokenizer, context, tokens, count, repeats):
    """What the scheduler does between a turn's prompt and its end."""
    chat = ChatSession(model, tokenizer)
    chat.runtime.end_ids = frozenset()
    chat.send(_history(tokenizer, context), max_new_tokens=2)
    question, options = [{"role": "user", "content": "Go on."}], TurnOptions(max_new_tokens=10 * tokens)
    turns = [Turn(chat.runtime, chat.state, question, options) for _ in range(count)]
    for turn in turns:
        turn.accept(choose([turn], turn.prefill())[0])
    batch = Batch()

    def steps():
        for _ in range(tokens):
            for turn, token in zip(turns, choose(turns, batch.step(turns)), strict=True):
                turn.accept(token)

    seconds = median_seconds(steps, model.device, repeats, 1)
    return {"what": "sessions, δ-mem", "sessions": count, "tokens/s": count * tokens / seconds}


def _served(model, tokenizer, context, tokens, count, folder):
    """From submitting all turns until the last is saved, so prompts and disk are in the time."""
    runtime, metrics = ChatRuntime(model, tokenizer), Metrics()
    runtime.end_ids = frozenset()  # replies of full length
    store = SessionStore({NAME: runtime}, folder, StoreLimits(), metrics)
    chat = ChatSession(model, tokenizer)
    chat.send(_history(tokenizer, context), max_new_tokens=2)
    states = [store.put(NAME, f"s{number}", chat.state) for number in range(count)]
    scheduler = TurnScheduler(metrics, most_together=count)
    question = [{"role": "user", "content": "Go on."}]

    def round_of_turns() -> None:
        events: queue.Queue = queue.Queue()
        for number in range(count):
            scheduler.submit(
                Job(
                    Turn(runtime, states[number], question, TurnOptions(max_new_tokens=tokens)),
                    emit=events.put,
                    commit=lambda state, n=number: store.put(NAME, f"s{n}", state),
                )
            )
        left = count
        while left:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            left -= isinstance(event, Finished)

    seconds = median_seconds(round_of_turns, model.device, 1, 1)
    scheduler.stop()
    store.close()
    return {"what": "whole turns, saved", "sessions": count, "tokens/s": count * tokens / seconds}


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
