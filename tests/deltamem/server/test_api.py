"""The API as its users meet it: through the official openai client."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from deltamem import ChatSession
from tests.deltamem.server.patient import http
from tests.tiny_models import make_chat_model

SMALL = {"model": "tiny", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def user(text):
    return {"role": "user", "content": text}


def test_a_completion_without_a_session_stands_alone(client, server):
    first = client.chat.completions.create(messages=[user("hello")], **SMALL)
    again = client.chat.completions.create(messages=[user("hello")], **SMALL)
    expected = ChatSession(*make_chat_model()).send("hello", max_new_tokens=8)
    choice = first.choices[0]
    assert choice.message.content == again.choices[0].message.content == expected.text
    assert (choice.message.role, choice.finish_reason, first.object) == (
        "assistant",
        "length",
        "chat.completion",
    )
    assert first.usage.completion_tokens == 8 and first.usage.prompt_tokens == expected.prompt_tokens
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert first.id != again.id


def test_a_streamed_completion_is_the_same_in_pieces(client):
    whole = client.chat.completions.create(messages=[user("hello")], **SMALL)
    stream = client.chat.completions.create(
        messages=[user("hello")], stream=True, stream_options={"include_usage": True}, **SMALL
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_a_session_goes_on_and_only_new_tokens_are_read(client, server):
    session = {"extra_body": {"session_id": "ada"}}
    first = client.chat.completions.create(messages=[user("I am Ada")], **SMALL, **session)
    second = client.chat.completions.create(messages=[user("who am I?")], **SMALL, **session)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    reference = ChatSession(*make_chat_model())
    reference.send("I am Ada", max_new_tokens=8)
    assert second.choices[0].message.content == reference.send("who am I?", max_new_tokens=8).text
    kept = server.chat.store.get("ada").memory
    torch.testing.assert_close(dict(kept.states), dict(reference.memory.states))
    # the whole history, as OpenAI's users send it, says the same as the new message alone
    history = [
        user("I am Ada"),
        first.choices[0].message.model_dump(),
        user("who am I?"),
        second.choices[0].message.model_dump(),
        user("sure?"),
    ]
    third = client.chat.completions.create(messages=history, **SMALL, extra_headers={"X-Session-Id": "ada"})
    assert third.choices[0].message.content == reference.send("sure?", max_new_tokens=8).text
    assert third.usage.prompt_tokens_details.cached_tokens == second.usage.total_tokens
    facts = third.model_extra["deltamem"]
    assert facts["session_id"] == "ada" and facts["memory_bytes"] == 3 * 64 * 4 and all(facts["memory_norms"])


def test_messages_that_contradict_the_session_are_refused(client):
    session = {"extra_body": {"session_id": "conflict"}}
    system = {"role": "system", "content": "Be brief."}
    client.chat.completions.create(messages=[system, user("one")], **SMALL, **session)
    client.chat.completions.create(messages=[system, user("two")], **SMALL, **session)
    for wrong in (
        [user("one"), {"role": "assistant", "content": "never said"}, user("two")],
        [{"role": "system", "content": "Be long."}, user("three")],
    ):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.chat.completions.create(messages=wrong, **SMALL, **session)
        assert caught.value.code == "session_conflict"
    with pytest.raises(openai.BadRequestError, match="new one from the user"):
        client.chat.completions.create(messages=[system], **SMALL, **session)


def test_a_turn_may_leave_the_memory_alone_or_be_answered_without_it(client, server):
    session = {"session_id": "quiet"}
    client.chat.completions.create(messages=[user("secret")], **SMALL, extra_body=session)
    before = server.chat.store.get("quiet")
    ask = [user("what is it?")]
    frozen = client.chat.completions.create(messages=ask, **SMALL, extra_body={**session, "without_memory": True})
    assert server.chat.store.get("quiet") is before
    reference = ChatSession(*make_chat_model())
    reference.send("secret", max_new_tokens=8)
    steered, expected = reference.compare("what is it?", max_new_tokens=8)
    assert frozen.choices[0].message.content == expected.text != steered.text
    silent = client.chat.completions.create(messages=ask, **SMALL, extra_body={**session, "write": False})
    assert silent.choices[0].message.content == steered.text
    after = server.chat.store.get("quiet")
    assert len(after.messages) == 4
    assert all(torch.equal(after.memory.states[i], before.memory.states[i]) for i in before.memory.states)


def test_turns_of_different_strength_are_decoded_together(client, server):
    reference = ChatSession(*make_chat_model())
    reference.send("secret", max_new_tokens=8)
    expected = {
        s: reference.fork().send("what is it?", max_new_tokens=8, write=False, strength=s).text for s in (0, 0.5, 1)
    }

    def ask(strength):
        session = {"session_id": f"strength-{strength}"}
        client.chat.completions.create(messages=[user("secret")], **SMALL, extra_body=session)
        more = {**session, "write": False, "strength": strength}
        return client.chat.completions.create(messages=[user("what is it?")], **SMALL, extra_body=more)

    with ThreadPoolExecutor(3) as pool:
        replies = dict(zip(expected, pool.map(ask, expected), strict=True))
    assert {s: reply.choices[0].message.content for s, reply in replies.items()} == expected
    assert len(set(expected.values())) == 3


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "deltamem"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(messages=[user("hi")], **{**SMALL, "model": "other"})
    assert caught.value.code == "model_not_found"


def test_a_session_can_be_looked_at_and_deleted(client, server):
    client.chat.completions.create(messages=[user("hi")], **SMALL, extra_body={"session_id": "a@b.c"})
    shown = http.get(f"{server.url}/v1/sessions/a%40b.c").json()
    assert [m["role"] for m in shown["messages"]] == ["user", "assistant"] and shown["disk_bytes"] > 1000
    deleted = http.delete(f"{server.url}/v1/sessions/a@b.c").json()
    assert deleted == {"id": "a@b.c", "deleted": True}
    gone = http.get(f"{server.url}/v1/sessions/a@b.c")
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "session_not_found"


def test_health_and_metrics_tell_what_happened(server, client):
    assert http.get(f"{server.url}/health").json() == {"status": "ok"}
    client.chat.completions.create(messages=[user("count me")], **SMALL)
    text = http.get(f"{server.url}/metrics").text
    assert 'deltamem_requests_total{path="/v1/chat/completions",status="200"}' in text
    for name in ("deltamem_tokens_total", "deltamem_batch_size_bucket", "deltamem_first_token_seconds_count"):
        assert name in text


def test_stop_and_seed_do_what_they_do_at_openai(client):
    whole = client.chat.completions.create(messages=[user("go")], **{**SMALL, "max_tokens": 30})
    stop = whole.choices[0].message.content[5]
    cut = client.chat.completions.create(messages=[user("go")], stop=stop, **{**SMALL, "max_tokens": 30})
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole.choices[0].message.content.split(stop)[0]
    drawn = {**SMALL, "temperature": 2.0, "max_tokens": 30, "seed": 7}
    texts = {client.chat.completions.create(messages=[user("go")], **drawn).choices[0].message.content for _ in "ab"}
    assert len(texts) == 1 and texts != {whole.choices[0].message.content}


def test_where_a_request_does_not_say_tokens_are_drawn_as_the_backbones_authors_do(start_server):
    model, tokenizer = make_chat_model()
    model.base_model.generation_config.top_k = 1  # the likeliest, whatever the temperature
    server = start_server(model=(model, tokenizer))

    def answer(**fields):
        return server.ask("go", max_tokens=20, **fields).json()["choices"][0]["message"]["content"]

    assert answer(temperature=None) == answer(temperature=0)
    assert answer(temperature=2, top_k=0, seed=1) != answer(temperature=0)


def test_a_key_is_asked_for_and_checked(start_server):
    server = start_server(api_key="sk-test")
    make = lambda key: openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)  # noqa: E731
    assert make("sk-test").chat.completions.create(messages=[user("hi")], **SMALL).choices
    for wrong in ("sk-tes", "sk-test2", "wrong"):
        with pytest.raises(openai.AuthenticationError) as caught:
            make(wrong).models.list()
        assert caught.value.code == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/v1/sessions/x"):
        assert http.get(server.url + path).status_code == 401
    assert http.get(f"{server.url}/v1/models", headers={b"Authorization": b"Bearer \xff\xfe"}).status_code == 401
    assert http.get(f"{server.url}/health").status_code == 200


def test_errors_after_the_stream_began_are_told_as_an_event(start_server, monkeypatch):
    server = start_server()
    monkeypatch.setattr(server.chat.store, "put", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    text = server.ask("hi", session="s", stream=True).text
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error" and "disk full" not in text and "[DONE]" not in text
    assert http.get(f"{server.url}/health").status_code == 200
