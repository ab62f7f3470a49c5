"""Registered adapters as MLflow pyfunc models, which answer as ``deltamem serve`` and ``deltamem chat`` do.

    model = mlflow.pyfunc.load_model("models:/deltamem-BACKBONE-STRATEGY@champion")
    reply = model.predict([{"role": "user", "content": "…"}])

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


class ChatModel:
    """Answers chats. Every call starts from an empty memory and writes the messages as it reads them.

    Args:
        model, tokenizer: the adapter on its backbone, in eval mode.
        max_new_tokens: longest reply where a call doesn't say.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> str | dict[str, Any]:
        """The reply to a chat.

        Args:
            model_input: messages ``[{"role": …, "content": …}, …]``, or a request as /v1/chat/completions takes it,
                ``{"messages": […], "max_tokens": …, …}``.
            params: see ``pipelines.registry.model_folder.PARAMS``; they go before the request's own fields.

        Returns:
            For messages the reply's text, by default the likeliest tokens; for a request a chat completion, by
            default drawn as the backbone's generation config says, else at temperature 1, as OpenAI's are.

        Raises:
            MlflowException: the messages or parameters aren't ones, or don't fit the window.
        """
        from mlflow.exceptions import MlflowException
        from pydantic import ValidationError

        from deltamem import ChatSession, DeltaMemError
        from deltamem.protocol.chat_completions import ChatRequest, Completion, new_messages, session_facts
        from deltamem.protocol.errors import RequestError, as_request_error

        whole = isinstance(model_input, dict)
        fields = dict(model_input) if whole else {"messages": _plain(model_input), "temperature": 0}
        fields |= {name: value for name, value in (params or {}).items() if value is not None}
        if "max_new_tokens" in fields:
            fields["max_tokens"] = fields.pop("max_new_tokens")
        chat = ChatSession(self.model, self.tokenizer)
        try:
            if not isinstance(fields.get("messages"), list):
                shape = '[{"role": "user", "content": "…"}, …]'
                raise RequestError(f'expected chat messages, {shape}, or a request, {{"messages": {shape}}}')
            for name in ELSEWHERE:
                if fields.get(name):
                    raise RequestError(f"{name}: this model is asked one chat at a time; use deltamem serve")
            asked = ChatRequest.model_validate({"model": "deltamem", **fields})
            messages = new_messages(chat.state, [message.plain() for message in asked.messages])
            options = asked.options(chat.runtime.sampling, chat.runtime.window, self.max_new_tokens)
            reply = chat.send(messages, **vars(options))
        except (ValidationError, DeltaMemError) as error:
            raise MlflowException.invalid_parameter_value(as_request_error(error).message) from error
        return Completion(asked.model).whole(reply, session_facts(chat.state)) if whole else reply.text


def _plain(messages: Any) -> Any:
    """Messages sent as "inputs" reach a model with their texts as arrays of no dimension."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    return [{key: value.item() if hasattr(value, "item") else value for key, value in m.items()} for m in messages]


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> ChatModel:
    """Called by MLflow with the registered folder."""
    from deltamem.cli.loading import load
    from pipelines.backbones.prepared import backbone_digest

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
