"""What chats know of a model that the engine computes: its adapter's configuration, its digests, and no weights."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem.backbone.facts import window as window_of
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.errors import WindowError
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel


class EngineRuntime(ChatRuntime):
    """A runtime whose model is the engine's.

    One token of the backbone's window stays free, because the engine is asked for one more than a reply has.

    Args:
        adapter: by which name the engine knows it.
    """

    def __init__(self, adapter: str, model: DeltaMemModel, tokenizer: PreTrainedTokenizerBase, window: int | None):
        limit = window_of(model.base_model.config) - 1
        if window is not None and window > limit:
            raise WindowError(f"a window of {window} tokens: this backbone in vLLM allows 2 to {limit}")
        super().__init__(model, tokenizer, window or limit)
        self.adapter = adapter
        digests = self.adapter_digest, self.backbone_digest  # remembered, so that sessions are known for ours
        assert all(digests)
        self._empty = {layer: state.cpu() for layer, state in model.new_memory(1).states.items()}

    def new_state(self) -> ChatState:
        """A chat without messages and with an empty memory."""
        return ChatState(DeltaMemory(self._empty))


def drop_weights(backbone: PreTrainedModel) -> None:
    """Free a backbone's weights, once all that is to be known of them is."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.new_empty(0)
