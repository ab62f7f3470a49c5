"""Chats at once, over HTTP: `python -m benchmarks.vllm_serving --help`.

How many tokens per second do 1, 8, 32 and 128 chats get together, and how long does each wait for its first? Asked of
our server, of vLLM without a memory (its own server on the bare backbone), and of our server with vLLM as its engine,
one after the other on the same machine. Each chat says one thing and is answered with so many tokens; all begin at
once. Greedy, so that nobody spends time on drawing. The memory is read and written at strength 0, so that all servers
say the same: an adapter that answers in a word would be compared by replies of one token.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer

from benchmarks.measure import report, run_benchmark
from benchmarks.processes import free_port

SERVERS = ("own", "vllm without memory", "vllm with memory")
STORY = (
    "Write a long story about {}, who lives in house number {} by the sea. Tell of the house, the sea and the storm."
)
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gil", "Hal")


def main(
    base: Annotated[str, typer.Option(help="backbone folder")],
    adapter: Annotated[str, typer.Option(help="adapter folder")],
    vllm_python: Annotated[str, typer.Option(help="Python of the environment with vLLM")] = ".venv-vllm/bin/python",
    server: Annotated[list[str], typer.Option(help=f"one of {', '.join(SERVERS)}")] = list(SERVERS),  # noqa: B006
    chats: Annotated[list[int], typer.Option(help="chats at once")] = [1, 8, 32, 128],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="tokens of each reply")] = 32,
    compiled: Annotated[bool, typer.Option(help="let vLLM compile its graphs")] = False,
    dtype: str = "float32",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Tokens per second of all chats together, and seconds to the first token of each."""
    rows = _rows(base, adapter, vllm_python, server, chats, tokens, compiled, dtype, device)
    report(rows, f"Chats at once, {tokens} tokens each", torch.device(device), out)


def _rows(base, adapter, vllm_python, servers, chats, tokens, compiled, dtype, device):
    for name in servers:
        with _running(name, base, adapter, vllm_python, max(chats), compiled, dtype, device) as url:
            more = {} if name == "vllm without memory" else {"strength": 0}
            _talk(url, 2, tokens, more)  # what the first requests alone pay
            for count in chats:
                yield {"server": name, "chats": count, **_talk(url, count, tokens, more)}


def _command(name, base, adapter, vllm_python, most, compiled, dtype, device, port, store) -> list[str]:
    deltamem = ["-c", "from deltamem.cli import main; main()", "serve", "--base", base, "--adapter", adapter]
    deltamem += ["--name", "model", "--store", store, "--port", str(port), "--dtype", dtype]
    if name == "own":
        return [sys.executable, *deltamem, "--batch-size", str(most), "--device", device]
    if name == "vllm with memory":
        settings = {"enforce_eager": not compiled, "max_num_seqs": most}
        return [vllm_python, *deltamem, "--engine", "vllm", "--engine-settings", json.dumps(settings)]
    plain = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", "model"]
    plain += ["--port", str(port), "--dtype", dtype, "--max-num-seqs", str(most)]
    return [vllm_python, *plain, *([] if compiled else ["--enforce-eager"])]


@contextlib.contextmanager
def _running(name, base, adapter, vllm_python, most, compiled, dtype, device) -> Generator[str]:
    """A server's address, while it runs."""
    port = free_port()
    with tempfile.TemporaryDirectory() as store:
        command = _command(name, base, adapter, vllm_python, most, compiled, dtype, device, port, store)
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", **os.environ}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url):
                if process.poll() is not None:
                    raise SystemExit(f"{name}: the server ended with {process.returncode}: {' '.join(command)}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def _talk(url: str, count: int, tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    """One round of chats, all begun together."""
    ready = threading.Barrier(count + 1)
    with ThreadPoolExecutor(count) as pool, httpx.Client(timeout=None, limits=httpx.Limits()) as client:
        chats = [pool.submit(_chat, client, url, number, tokens, more, ready) for number in range(count)]
        ready.wait()
        began = time.perf_counter()
        told = [chat.result() for chat in chats]
        seconds = time.perf_counter() - began
    firsts = sorted(first - began for first, _, _ in told)
    decoding = [(total - 1) / (last - first) for first, last, total in told if total > 1]
    return {
        "tokens/s": sum(total for _, _, total in told) / seconds,
        "first token, median s": statistics.median(firsts),
        "first token, last s": firsts[-1],
        "tokens/s of a chat after it": statistics.median(decoding),
    }


def _chat(client: httpx.Client, url: str, number: int, tokens: int, more: dict[str, Any], ready: threading.Barrier):
    """(time of the first token, of the last, tokens)."""
    text = STORY.format(NAMES[number % len(NAMES)], number)
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **more}
    ready.wait()
    first = last = total = 0
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                last = time.perf_counter()
                first = first or last
            elif event.get("usage"):
                total = event["usage"]["completion_tokens"]
    return first, last, total


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
