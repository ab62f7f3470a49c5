"""What every chat on one model shares: the model, its tokenizer, the window, and what a turn is to feed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from deltamem.backbone import facts
from deltamem.chat import identity
from deltamem.chat.format import encode_history, encode_messages, encode_turn
from deltamem.chat.messages import EncodedMessages, Message
from deltamem.chat.prompt_parts import PART_TOKENS
from deltamem.chat.state import ChatState, Prompt
from deltamem.errors import DeltaMemError, WindowError
from deltamem.model import DeltaMemModel, segment_of


class ChatRuntime:
    """A model with its tokenizer, as chats use them.

    Args:
        window: most tokens of a prompt and its reply; the backbone's own limit by default.
        part_tokens: longer prompts are fed in parts of this length (:mod:`deltamem.chat.prompt_parts`).
        compiled: compile the layers that decode (:class:`deltamem.decoding.slot_decoder.SlotDecoder`).

    Raises:
        DeltaMemError: the tokenizer has no chat template, or the window or ``part_tokens`` is out of range.
    """

    def __init__(
        self,
        model: DeltaMemModel,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None = None,
        part_tokens: int = PART_TOKENS,
        compiled: bool = False,
    ):
        if tokenizer.chat_template is None:
            raise DeltaMemError(
                "the backbone's tokenizer has no chat template, so there is no chatting with it: take a backbone that "
                "was made for chats (…-Instruct), or give the tokenizer a template"
            )
        limit = facts.window(model.base_model.config)
        self.model, self.tokenizer = model, tokenizer
        self.window = window or limit
        if not 2 <= self.window <= limit:
            raise WindowError(f"a window of {self.window} tokens: the backbone allows 2 to {limit}")
        if part_tokens < 1:
            raise DeltaMemError(f"part_tokens must be at least 1, got {part_tokens}")
        self.part_tokens, self.compiled = part_tokens, compiled
        self.segment = segment_of(model)

    def new_state(self) -> ChatState:
        """A chat without messages and with an empty memory."""
        return ChatState(self.model.new_memory(1))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return facts.end_ids(self.model.base_model, self.tokenizer)

    @property
    def vocabulary(self) -> int:
        """How many tokens the backbone tells scores of."""
        return self.model.base_model.config.get_text_config(decoder=True).vocab_size

    @cached_property
    def sampling(self) -> dict[str, float]:
        """How to draw where nobody says, by the names of :class:`deltamem.chat.reply.TurnOptions`.

        It is as the backbone's generation config says, else as OpenAI does: at temperature 1 from all tokens.
        """
        said = self.model.base_model.generation_config.to_diff_dict()  # without transformers' own defaults
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        defaults |= {"min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
        return {name: other if said.get(name) is None else said[name] for name, other in defaults.items()}

    def prompt(self, state: ChatState, messages: Sequence[Message], max_new_tokens: int) -> Prompt:
        """Decide what to feed for ``messages`` after ``state``.

        When cache, messages and a reply don't fit the window, earlier turns leave: the latest turns that fill at most
        half of the room that is left are rendered and read anew, without being written again. The positions then start
        from zero (which every kind of position encoding allows), and the turns that follow are cheap again. Of a state
        that comes without its cache, as one kept by another engine does, the prompt's tokens are read anew in this way.

        Raises:
            WindowError: the new messages alone don't fit.
        """
        if state.tokens:
            new = encode_turn(self.tokenizer, messages, self.segment)
        else:  # a chat begins, or begins again after its prompt was cleared
            new = self._encode([*state.system, *messages])
        reserve = min(max_new_tokens, max(1, self.window // 4))
        room = self.window - reserve - len(new.input_ids)
        if len(state.tokens) <= room:
            return Prompt(None if state.keys.length == len(state.tokens) else state.tokens, new, state.start)
        turns = [i for i, message in enumerate(state.messages) if message["role"] == "user" and i > state.start]
        for start in turns:
            try:
                ids = encode_history(self.tokenizer, [*state.system, *state.messages[start:]], messages)
            except DeltaMemError:
                continue
            if len(ids) <= room // 2:
                return Prompt(tuple(ids), new, start)
        alone = self._encode([*state.system, *messages])
        if len(alone.input_ids) >= self.window:
            raise WindowError(
                f"the messages are {len(alone.input_ids)} tokens long, the window holds {self.window} with "
                "the reply; send less at a time"
            )
        return Prompt((), alone, len(state.messages))

    def _encode(self, messages: Sequence[Message]) -> EncodedMessages:
        return encode_messages(self.tokenizer, messages, True, self.segment)

    @cached_property
    def adapter_digest(self) -> str:
        """Tells a saved chat's adapter from others."""
        return identity.adapter_digest(self.model)

    @cached_property
    def backbone_digest(self) -> str:
        """Tells a saved chat's backbone from others."""
        return identity.backbone_digest(self.model.base_model)
