"""A turn of a chat as one request to the engine.

A request feeds the whole prompt, and the engine's cache of beginnings spares what it has computed before. So that this
finds something, a chat's turns are told as one growing sequence: the memory it began with (``base``), all tokens since,
and from where they are written. Its state after any token is a function of these three, whether it comes from the cache
or is computed again. Where a turn can't go on in this way (the prompt was moved or cleared, the chat comes from a file,
a turn is only read) a new sequence begins from the memory as it is, and earlier tokens are read without being written.

The engine feeds a token only to go on from it: after an end token everything said is in the memory, after a reply that
grew too long its last token isn't, so one more is asked for than will be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from deltamem.chat.messages import Message
from deltamem.chat.open_turn import OpenTurn
from deltamem.chat.reply import TurnOptions
from deltamem.chat.state import ChatState
from deltamem.decoding.key_values import KeyValues
from deltamem.memory import DeltaMemory
from deltamem.protocol.errors import RequestError
from deltamem_vllm.handover import Handover, from_bytes, to_bytes
from deltamem_vllm.runtime import EngineRuntime


@dataclass(frozen=True, kw_only=True)
class EngineSequence(KeyValues):
    """In place of a chat's cache: the sequence that the engine may have in its own.

    Attributes:
        base: the memory before the first token.
        write_from: the first position that is written.
        strength: with which it was read.
    """

    base: DeltaMemory
    write_from: int
    strength: float

    @property
    def nbytes(self) -> int:
        """Of the memory it holds."""
        return sum(state.nbytes for state in self.base.states.values())


class EngineTurn(OpenTurn):
    """A turn that the engine computes.

    Attributes:
        tokens: the whole prompt.
        adapter: by which name the engine knows it.

    Raises:
        RequestError: a way of drawing tokens that the engine doesn't have.
    """

    def __init__(self, runtime: EngineRuntime, before: ChatState, messages: Sequence[Message], options: TurnOptions):
        if not isinstance(before.keys, EngineSequence):  # another engine's keys and values spare nothing here
            before = replace(before, keys=KeyValues(), parts=())
        super().__init__(runtime, before, messages, options)
        self.adapter = runtime.adapter
        if options.typical_p != 1:
            raise RequestError("typical_p: vLLM doesn't draw tokens in this way", "unsupported", "typical_p")
        wrong = [token for token in options.logit_bias if not 0 <= token < runtime.vocabulary]
        if wrong:
            raise RequestError(f"logit_bias: there is no token {wrong[0]}", param="logit_bias")
        read = self.plan.rebuild or ()
        self.tokens = [*read, *self.plan.new.input_ids]
        strength = runtime.model.strength if options.strength is None else options.strength
        said, goes_on = before.keys, options.write and tuple(read) == before.tokens
        if goes_on and isinstance(said, EngineSequence) and said.strength == strength:
            self.sequence = said
        else:
            self.sequence = EngineSequence(base=before.memory, write_from=len(read), strength=strength)

    def handover(self, keep: str | None) -> Handover:
        """What the engine is told of the memory; ``keep``: under which key to keep it."""
        sequence, write = self.sequence, self.options.write
        start = sequence.write_from if write else None
        return Handover(to_bytes(sequence.base), start, sequence.strength, keep if write else None, self.adapter)

    def sampling(self, keep: str) -> SamplingParams:
        """How the engine is to answer."""
        options = self.options
        return SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=dict(options.logit_bias) or None,
            seed=options.seed,
            max_tokens=self.longest - self.prompt_length + 1,
            stop_token_ids=sorted(self.runtime.end_ids),
            **self._plain(keep),
        )

    def rereading(self, keep: str) -> SamplingParams:
        """For a prompt that is only fed for its memory."""
        return SamplingParams(temperature=0, max_tokens=1, **self._plain(keep))

    def _plain(self, keep: str) -> dict[str, Any]:
        return {
            "ignore_eos": True,  # the end tokens are said
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
            "extra_args": {"kv_transfer_params": self.handover(keep).params()},
        }

    @property
    def fed(self) -> list[int]:
        """Prompt and reply, what a finished turn leaves in the memory."""
        return [*self.tokens, *self.reply.kept_tokens]

    def finish(self, memory: bytes | None) -> ChatState:
        """The chat's state after the turn; ``memory``: after :attr:`fed`, None where nothing was written."""
        if memory is None:
            return self.after(self.before.memory, self.fed, KeyValues())
        layers = sorted(self.sequence.base.states)
        after = from_bytes(memory, self.runtime.model.config, layers)
        return self.after(replace(after, metadata=self.before.memory.metadata), self.fed, self.sequence)
