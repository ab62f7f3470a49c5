"""Registered adapters as MLflow pyfunc models, which answer as ``deltamem serve`` and ``deltamem chat`` do.

    model = mlflow.pyfunc.load_model("models:/deltamem-BACKBONE-STRATEGY@champion")
    reply = model.predict("…")                                       # a text: the reply's text
    reply = model.predict([{"role": "user", "content": "…"}])        # a chat: the reply's text
    replies = model.predict(pandas.DataFrame({"question": [...]}))   # a chat per row: their texts
    completion = model.predict({"messages": [...], "max_tokens": 64})  # a request: what OpenAI's servers answer

    mlflow models predict -m models:/deltamem-BACKBONE-STRATEGY@champion --env-manager local -i request.json
    mlflow models serve -m models:/deltamem-BACKBONE-STRATEGY@champion --env-manager local --port 5001
    curl localhost:5001/invocations -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "…"}], "max_tokens": 64}'

MLflow's server keeps nothing between requests; ``deltamem serve`` has sessions and streams. The registered folder
holds the adapter and the place of its backbone, never the backbone's weights. Where the backbone lies elsewhere:
``load_model(uri, model_config={"backbone": FOLDER})``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.errors import StageError

# Fields of a chat request that need what MLflow's server hasn't: something kept or sent between requests.
ELSEWHERE = ("session_id", "stream", "without_memory")
_MESSAGES = '[{"role": "user", "content": "…"}, …]'
SHAPES = (
    f"a text; chat messages, {_MESSAGES}; several of either in a list; a table with one column of texts, with a column "
    f'"messages" or with the columns "role" and "content"; or a request, {{"messages": {_MESSAGES}}}'
)


class ChatModel:
    """Answers chats. Every call starts from an empty memory and writes the messages as it reads them.

    Args:
        model, tokenizer: the adapter on its backbone, in eval mode.
        max_new_tokens: longest reply where a call doesn't say.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> str | list[str] | dict[str, Any]:
        """The reply to a chat, or the replies to several.

        Args:
            model_input: ``SHAPES``; a request has the fields that /v1/chat/completions takes.
            params: see ``pipelines.registry.model_folder.PARAMS``; they go before the request's own fields.

        Returns:
            For a request a chat completion, by default drawn as the backbone's generation config says, else at
            temperature 1, as OpenAI's are. For anything else the reply's text, by default the likeliest tokens; for
            several chats a list of texts.

        Raises:
            MlflowException: the messages or parameters aren't ones, or don't fit the window.
        """
        from mlflow.exceptions import MlflowException
        from pydantic import ValidationError

        from deltamem import DeltaMemError
        from deltamem.protocol.errors import as_request_error

        said = {name: value for name, value in (params or {}).items() if value is not None}
        if "max_new_tokens" in said:
            said["max_tokens"] = said.pop("max_new_tokens")
        try:
            if isinstance(model_input, dict):
                return self._complete({**model_input, **said})
            chats, several = _chats(model_input)
            done = [self._complete({"messages": chat, "temperature": 0, **said}) for chat in chats]
        except (ValidationError, DeltaMemError) as error:
            raise MlflowException.invalid_parameter_value(as_request_error(error).message) from error
        texts = [completion["choices"][0]["message"]["content"] for completion in done]
        return texts if several else texts[0]

    def _complete(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The chat completion of one request."""
        from deltamem import ChatSession
        from deltamem.protocol.errors import RequestError
        from deltamem.protocol.requests import ChatRequest, new_messages
        from deltamem.protocol.responses import Completion, session_facts

        if not isinstance(fields.get("messages"), list):
            raise RequestError(f"expected {SHAPES}")
        for name in ELSEWHERE:
            if fields.get(name):
                raise RequestError(f"{name}: this model is asked one chat at a time; use deltamem serve")
        asked = ChatRequest.model_validate({"model": "deltamem", **fields})
        chat = ChatSession(self.model, self.tokenizer)
        messages = new_messages(chat.state, [message.plain() for message in asked.messages])
        options = asked.options(chat.runtime.sampling, chat.runtime.window, self.max_new_tokens)
        reply = chat.send(messages, **vars(options))
        return Completion(asked.model).whole(reply, session_facts(chat.state))


def _chats(model_input: Any) -> tuple[list[Any], bool]:
    """The chats that an input of one of the ``SHAPES`` holds, and whether it may hold several.

    Raises:
        RequestError: it has none of these shapes.
    """
    from deltamem.protocol.errors import RequestError

    if hasattr(model_input, "columns"):
        return _rows(model_input)
    # MLflow's server makes arrays of what comes as "inputs": of texts in a list, of one text, of a message's texts
    plain = model_input.tolist() if hasattr(model_input, "tolist") else model_input
    if isinstance(plain, str):
        return [[{"role": "user", "content": plain}]], False
    if not isinstance(plain, list):
        raise RequestError(f"expected {SHAPES}, not a {type(plain).__name__}")
    if plain and all(isinstance(chat, str | list) for chat in plain):
        return [_chats(chat)[0][0] for chat in plain], True
    return [[_plain(message) for message in plain]], False


def _rows(table: Any) -> tuple[list[Any], bool]:
    """The chats in a pandas.DataFrame."""
    from deltamem.protocol.errors import RequestError

    if {"role", "content"} <= set(table.columns):  # one chat, a message per row
        return [table[["role", "content"]].to_dict("records")], False
    names = ["messages"] if "messages" in table.columns else list(table.columns)
    if len(names) != 1:
        raise RequestError(f"the table has the columns {', '.join(map(str, names))}; expected {SHAPES}")
    return [_chats(chat)[0][0] for chat in table[names[0]]], True


def _plain(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value.item() if hasattr(value, "item") else value for key, value in message.items()}


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> ChatModel:
    """Called by MLflow with the registered folder."""
    from deltamem.cli.loading import load
    from pipelines.backbones.record import backbone_digest

    folder = Path(model_config["backbone"])
    if not folder.is_dir():
        raise StageError(
            f"{path}: its backbone is not at {folder}. Make it with `python -m pipelines.backbone` and pass "
            'its folder: load_model(uri, model_config={"backbone": FOLDER}).'
        )
    if (found := backbone_digest(folder)) != model_config["backbone_digest"]:
        raise StageError(
            f"{path}: the adapter was trained on the backbone with digest "
            f"{model_config['backbone_digest'][:12]}, {folder} holds {found[:12]}."
        )
    model, tokenizer = load(str(folder), path, None, None, "auto")
    return ChatModel(model, tokenizer, model_config["max_new_tokens"])
