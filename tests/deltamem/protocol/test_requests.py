"""What a request may hold, and what is said of the rest."""

import re

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase, CompletionCreateParamsNonStreaming
from pydantic import ValidationError

from deltamem.chat.runtime import ChatRuntime
from deltamem.protocol.errors import RequestError, as_request_error
from deltamem.protocol.fields import IGNORED, UNSERVED
from deltamem.protocol.requests import ChatRequest, new_messages
from tests.paths import PROJECT
from tests.tiny_models import make_chat_model

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
U1, U2 = ({"role": "user", "content": text} for text in ("1", "2"))
A1, A2 = ({"role": "assistant", "content": text} for text in ("one", "two"))


def parse(**fields):
    return ChatRequest.model_validate({**ASKED, **fields})


def why(**fields):
    with pytest.raises(ValidationError) as caught:
        parse(**fields)
    return as_request_error(caught.value)


def message(content, role="user", **more):
    return [{"role": role, "content": content, **more}]


def test_fields_that_ask_for_nothing_change_nothing():
    plain = parse()
    assert parse(**dict.fromkeys(set(ChatRequest.model_fields) - set(ASKED))) == plain
    for name, (_, neutral) in UNSERVED.items():
        assert parse(**{name: None}) == plain
        for value in neutral:
            assert parse(**{name: value}) == plain
    for name in IGNORED:
        assert parse(**{name: "anything"}) == plain
    assert parse(logit_bias={}, stop=[], presence_penalty=0, frequency_penalty=0.0, unheard_of=[]) == plain


ASKS = {
    "tools": [{"type": "function"}], "tool_choice": "required", "response_format": {"type": "json_object"}, "n": 2,
    "logprobs": True, "top_logprobs": 3, "reasoning_effort": "high", "echo": True, "ignore_eos": True, "mirostat": 2,
    "skip_special_tokens": False, "guided_json": {"type": "object"}, "min_tokens": 5, "chat_template": "{{ x }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ASKS)
def test_what_is_not_served_is_refused_with_the_reason(name):
    error = why(**{name: ASKS[name]})
    assert (error.code, error.param) == ("unsupported", name)
    assert error.message == f"{name}: {UNSERVED[name].why}"


def test_a_field_that_nobody_knows_is_named():
    error = why(tempreature=0.5)
    assert (error.code, error.param) == ("unknown_field", "tempreature")
    assert error.message == "tempreature: this server knows no such field"


def test_every_field_of_the_openai_client_is_accounted_for():
    theirs = {*CompletionCreateParamsBase.__annotations__, *CompletionCreateParamsNonStreaming.__annotations__}
    assert theirs <= {*ChatRequest.model_fields, *IGNORED, *UNSERVED}


def test_the_page_about_the_server_tells_every_field():
    rows = re.findall(r"^\| (`.+?) \|", (PROJECT / "docs/server.md").read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == {*ChatRequest.model_fields, "repeat_penalty", *IGNORED, *UNSERVED}


@pytest.mark.parametrize(
    "messages, text",
    [
        (message([{"type": "text", "text": "a "}, {"type": "text", "text": "b", "cache_control": {}}]), "a b"),
        (message("x", name="ada", id="msg_1", timestamp=1, annotations=[], tool_calls=None, refusal=None), "x"),
        (message(None, "assistant", reasoning_content="hm"), ""),
        ([{"role": "assistant"}], ""),
    ],
)
def test_messages_as_clients_write_them_are_read_as_text(messages, text):
    assert parse(messages=messages).messages[0].plain()["content"] == text


@pytest.mark.parametrize(
    "messages, said",
    [
        (message(None), "messages.0.content: is missing or null; a message of role 'user' needs text"),
        ([{"role": "system"}], "messages.0.content: is missing or null; a message of role 'system' needs text"),
        (
            message([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
            "messages.0.content: part 1 is of type 'image_url'; only parts of type 'text' can be read",
        ),
        (message(["words"]), "messages.0.content: part 0 is of type 'str'; only parts of type 'text' can be read"),
        (message("", "assistant", tool_calls=[{"id": "1"}]), "messages.0: tool_calls can't be read, only text"),
        (message("42", "tool", tool_call_id="1"), "messages.0.role: Input should be 'system', 'developer', 'user'"),
    ],
)
def test_messages_that_are_not_text_are_refused_in_a_sentence(messages, said):
    error = why(messages=messages)
    assert error.message.startswith(said) and error.param.startswith("messages.0")


@pytest.mark.parametrize(
    "fields, name, value",
    [
        ({"top_k": -1}, "top_k", 0),
        ({"repeat_penalty": 1.3}, "repetition_penalty", 1.3),
        ({"logit_bias": {"17": -100}}, "logit_bias", {17: -100}),
        ({"stop": "END"}, "stop", ("END",)),
        ({"max_completion_tokens": 7}, "max_new_tokens", 7),
    ],
)
def test_other_ways_to_say_a_field(fields, name, value):
    sampling = ChatRuntime(*make_chat_model()).sampling
    assert getattr(parse(**fields).options(sampling, 100), name) == value


class Session:
    """As much of a chat's state as tells which messages are new."""

    def __init__(self, *messages):
        self.messages = messages


TWO_TURNS = Session(U1, A1, U2, A2)


@pytest.mark.parametrize(
    "session, sent, history, new",
    [
        (Session(), [U1], None, [U1]),
        (Session(), [U1, A1, U2], "new", [U1, A1, U2]),
        (Session(U1, A1), [U1, A1, U2], None, [U2]),
        (Session(U1, A1), [U1, A1, U2], "whole", [U2]),
        (Session(U1, A1), [U2], None, [U2]),
        (Session(U1, A1), [U1], "new", [U1]),  # the same words again, and meant so
    ],
)
def test_what_is_new_of_what_a_client_sends(session, sent, history, new):
    assert new_messages(session, sent, history) == new


@pytest.mark.parametrize(
    "session, sent, history",
    [
        (Session(U1, A1), [U1], None),  # the first reply is asked for again
        (Session(U1, A1), [U1], "whole"),
        (Session(U1, A1), [U2], "whole"),  # the first message was edited
        (TWO_TURNS, [U1], None),
        (TWO_TURNS, [U1, A1, U2], None),
        (TWO_TURNS, [U1, A1, U1], None),
        (TWO_TURNS, [U1, A1, U1], "new"),
    ],
)
def test_a_past_that_is_changed_is_a_conflict(session, sent, history):
    with pytest.raises(RequestError, match="begin another session") as caught:
        new_messages(session, sent, history)
    assert caught.value.code == "session_conflict"
