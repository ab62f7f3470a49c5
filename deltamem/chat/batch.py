"""Turns of many sessions decoded together, one token each per step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from deltamem.chat.turn import Turn
from deltamem.decoding.slot_decoder import SlotDecoder, round_up


class Batch:
    """Turns whose next tokens come out of one forward pass of a :class:`deltamem.decoding.slot_decoder.SlotDecoder`.

    A turn's cache and memory are copied into a slot when it joins and out of it when it leaves; the others don't move.
    A decoder with more or longer slots is made when the turns need one.
    """

    def __init__(self) -> None:
        self._decoder: SlotDecoder | None = None
        self._slot_of: dict[Turn, int] = {}

    def __contains__(self, turn: Turn) -> bool:
        return turn in self._slot_of

    def step(self, turns: Sequence[Turn]) -> Tensor:
        """Feed each turn's last token; returns the next logits [B, V] in the order of ``turns``."""
        self.release([turn for turn in self._slot_of if turn not in turns])
        if new := [turn for turn in turns if turn not in self._slot_of]:
            self._join(turns, new)
        decoder, slots = self._decoder, [self._slot_of[turn] for turn in turns]
        assert decoder is not None  # joining has made one
        tokens = torch.zeros(decoder.slots, 1, dtype=torch.long)
        tokens[slots, 0] = torch.tensor([turn.next_token for turn in turns])
        decoder.token.copy_(tokens)
        logits = decoder.step()[slots]
        for turn in turns:
            turn.tokens.append(turn.next_token)
        return logits

    def release(self, turns: Sequence[Turn] | None = None) -> None:
        """Hand turns (None: all) their own cache and memory, and forget them."""
        turns = list(self._slot_of) if turns is None else list(turns)
        for turn in turns:
            assert self._decoder is not None  # a turn is in a slot of one
            turn.keys, turn.memory = self._decoder.take(self._slot_of[turn])
        self.drop(turns)

    def drop(self, turns: Iterable[Turn]) -> None:
        """Forget turns that nobody waits for; what they have read and written is gone."""
        slots = [self._slot_of.pop(turn) for turn in turns if turn in self._slot_of]
        if slots and self._decoder is not None:
            self._decoder.free(slots)

    def _join(self, turns: Sequence[Turn], new: Sequence[Turn]) -> None:
        model, decoder = new[0].runtime.model, self._decoder
        cuda = model.device.type == "cuda"
        rows = round_up(len(turns), model.device)
        length = round_up(max(turn.longest for turn in turns), model.device)
        long_enough = decoder is not None and decoder.capacity >= length
        if decoder is None or not long_enough or not (decoder.slots == rows or (cuda and decoder.slots > rows)):
            self.release()
            self._decoder = decoder = None  # its buffers go before new ones are made
            self._decoder = decoder = SlotDecoder(model, rows, length, compiled=new[0].runtime.compiled)
            new = turns
        free = [slot for slot in range(decoder.slots) if slot not in self._slot_of.values()]
        for slot, turn in zip(free, new, strict=False):
            first = torch.tensor([turn.next_token], device=model.device)
            strength = turn.options.strength
            decoder.fill([slot], turn.keys, first, turn.memory, write=turn.writes_tokens, strength=strength)
            self._slot_of[turn] = slot
