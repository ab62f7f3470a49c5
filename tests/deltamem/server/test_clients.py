"""Requests as clients and front ends send them; those of programs that aren't installed here are modelled on theirs."""

import json

import openai
import pytest

from deltamem import ChatSession
from deltamem.server.run import check_reach
from tests.deltamem.server.patient import http
from tests.full_disk import full_disk
from tests.tiny_models import make_chat_model

HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
SMALL = {"model": "tiny", "max_tokens": 8, "temperature": 0}
BODIES = {
    # as langchain-openai and litellm send them (recorded); the others after their programs' sources and documentation
    "langchain, streamed": {
        "model": "tiny", "stream": True, "messages": HELLO, "max_completion_tokens": 8, "presence_penalty": 0,
        "seed": 3, "temperature": 0.0, "top_p": 0.9,
    },
    "litellm, streamed": {
        **SMALL, "messages": HELLO, "n": 1, "logit_bias": {}, "response_format": {"type": "text"}, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "open-webui": {
        **SMALL, "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "top_p": 0.9, "seed": 0,
        "frequency_penalty": 0, "presence_penalty": 0, "stop": [], "logit_bias": {}, "tools": [],
        "response_format": None, "user": {"name": "Ada", "id": "1", "email": "ada@example.org", "role": "admin"},
    },
    "langchain": {
        **SMALL, "messages": [{"role": "user", "content": "hello", "name": None}], "stream": False, "n": 1,
        "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": False, "parallel_tool_calls": None,
    },
    "litellm": {
        "model": "tiny", "messages": HELLO, "max_completion_tokens": 8, "temperature": 0, "n": 1, "stop": None,
        "user": "default_user_id", "metadata": {"generation_name": "x", "tags": ["a"]}, "tool_choice": "auto",
        "response_format": {"type": "text"}, "service_tier": "auto", "store": False, "reasoning_effort": None,
    },
    "librechat": {
        **SMALL, "messages": PARTS, "stream": True, "user": "6650f0", "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0,
    },
    "continue": {
        **SMALL, "messages": [{"role": "system", "content": ""}, *PARTS], "stream": True, "stop": ["<|im_end|>"],
        "parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"},
    },
    "llama.cpp-page": {
        **SMALL, "messages": [{**HELLO[0], "id": 17, "timestamp": 1, "extra": []}], "stream": True,
        "cache_prompt": True, "reasoning_format": "auto", "top_k": 0, "min_p": 0, "typical_p": 1, "xtc_probability": 0,
        "repeat_penalty": 1,
        "dynatemp_range": 0, "dry_multiplier": 0, "timings_per_token": True, "samplers": [],
    },
    "vllm-client": {
        **SMALL, "messages": HELLO, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "add_generation_prompt": True, "use_beam_search": False,
        "ignore_eos": False, "chat_template_kwargs": {"enable_thinking": False}, "priority": 3,
    },
}  # fmt: skip


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")  # with its retries


def text_of(answer):
    """The reply in a response, streamed or whole."""
    if "event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])


@pytest.mark.parametrize("name", BODIES)
def test_a_front_ends_request_is_answered_as_it_stands(server, name):
    answer = http.post(f"{server.url}/v1/chat/completions", json=BODIES[name])
    assert answer.status_code == 200, answer.text
    messages = [{"role": "system", "content": ""}, *HELLO] if name == "continue" else HELLO
    expected = ChatSession(*make_chat_model()).send(messages, max_new_tokens=8)
    assert text_of(answer) == expected.text


def test_the_openai_client_sends_what_it_likes(client):
    reply = client.chat.completions.create(
        messages=HELLO, n=1, logprobs=False, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"70": 5},
        tools=[], tool_choice="none", response_format={"type": "text"}, user="ada", metadata={"a": "b"}, store=False,
        modalities=["text"], service_tier="auto", parallel_tool_calls=False, prompt_cache_key="k", **SMALL,
        extra_body={"min_p": 0.05, "repetition_penalty": 1.1, "typical_p": 0.9, "top_k": 5},
    )  # fmt: skip
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {70: 5}, "repetition_penalty": 1.1}
    assert (
        reply.choices[0].message.content
        == ChatSession(*make_chat_model()).send("hello", max_new_tokens=8, **options).text
    )


def count_requests(server):
    return sum(
        sample.value
        for metric in server.chat.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["path"] == "/v1/chat/completions"
    )


@pytest.mark.parametrize("again", [HELLO, [{"role": "user", "content": "hallo"}]])
def test_a_first_message_asked_again_or_edited_is_refused_once_and_not_written_twice(start_server, again):
    server = start_server(history="whole")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    session = {"extra_body": {"session_id": "s"}}
    client.chat.completions.create(messages=HELLO, **SMALL, **session)
    before, asked = server.chat.store.get("s"), count_requests(server)
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(messages=again, **SMALL, **session)
    assert caught.value.code == "session_conflict" and count_requests(server) == asked + 1
    assert server.chat.store.get("s") is before


def test_the_same_first_message_is_refused_unless_it_is_called_new(client, server):
    session = {"session_id": "twice"}
    client.chat.completions.create(messages=HELLO, **SMALL, extra_body=session)
    with pytest.raises(openai.UnprocessableEntityError, match="history: 'new'"):
        client.chat.completions.create(messages=HELLO, **SMALL, extra_body=session)
    client.chat.completions.create(messages=HELLO, **SMALL, extra_body={**session, "history": "new"})
    assert [m["content"] for m in server.chat.store.get("twice").messages[::2]] == ["hello", "hello"]


def test_a_full_disk_takes_the_turn_back_and_says_so(client, server):
    session = {"extra_body": {"session_id": "full"}}
    client.chat.completions.create(messages=HELLO, **SMALL, **session)
    before = server.chat.store.get("full")
    with full_disk(), pytest.raises(openai.InternalServerError, match="disk is full") as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "more"}], **SMALL, **session)
    assert caught.value.status_code == 507
    assert server.chat.store.get("full") is before
    reply = client.chat.completions.create(messages=[{"role": "user", "content": "more"}], **SMALL, **session)
    assert reply.usage.prompt_tokens_details.cached_tokens == before.keys.length


def test_turns_leave_the_prompt_and_stay_in_the_memory(client, server):
    session = {"session_id": "cleared"}
    client.chat.completions.create(messages=[{"role": "user", "content": "a secret"}], **SMALL, extra_body=session)
    before = server.chat.store.get("cleared")
    facts = http.delete(f"{server.url}/v1/sessions/cleared/prompt").json()
    assert (facts["forgotten_messages"], facts["prompt_tokens"]) == (2, 0) and len(facts["messages"]) == 2
    reply = client.chat.completions.create(messages=HELLO, **SMALL, extra_body={**session, "write": False})
    alone = ChatSession(server.runtime.model, server.runtime.tokenizer)
    alone.send("a secret", max_new_tokens=8)
    alone.clear_prompt()
    assert reply.choices[0].message.content == alone.send("hello", max_new_tokens=8, write=False).text
    after = server.chat.store.get("cleared").memory
    assert all((after.states[i] == before.memory.states[i]).all() for i in after.states)
    gone = http.delete(f"{server.url}/v1/sessions/nobody/prompt")
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "session_not_found"


PREFLIGHT = {
    "Origin": "https://chat.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_pages_of_named_origins_may_call_and_no_others(start_server):
    server = start_server(origins=("https://chat.example",), api_key="sk-cors")
    address = f"{server.url}/v1/chat/completions"
    allowed = http.options(address, headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert http.options(address, headers={**PREFLIGHT, "Origin": "https://evil.example"}).status_code == 400
    headers = {"Origin": "https://chat.example", "Authorization": "Bearer sk-cors"}
    answer = http.post(address, json={**SMALL, "messages": HELLO}, headers=headers)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"


def test_no_other_page_may_call_unless_the_server_is_told_so(server):
    assert http.options(f"{server.url}/v1/chat/completions", headers=PREFLIGHT).status_code == 405
    with pytest.raises(ValueError, match="every web page could use the server"):
        check_reach("127.0.0.1", None, ("*",))
    check_reach("127.0.0.1", "key", ("*",))
