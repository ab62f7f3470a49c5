"""δ-mem as a model of lm-evaluation-harness, for any task of the harness.

    deltamem-lm-eval --model deltamem --model_args base=PATH_OR_HUB_ID,adapter=PATH --tasks ifeval \\
        --apply_chat_template --batch_size 8

runs the harness's own command line with the model ``deltamem`` known to it (the same: ``python -m
pipelines.harness.model …``); without ``adapter`` it evaluates the frozen backbone. The keys of
``--model_args`` are the arguments of :func:`pipelines.harness.loading.load`.

A request starts with an empty memory; its prompt and its answer are written as they are read, as in the
paper. Answers are greedy unless the evaluation stage has them drawn.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel
from deltamem.backbone import facts
from deltamem.chat.format import TEMPLATE_OPTIONS, encode_messages
from deltamem.chat.messages import EncodedMessages
from deltamem.errors import DeltaMemError
from deltamem.model import backbone_of, segment_of
from pipelines.evaluation.passes import Rows, reader_of
from pipelines.evaluation.records import RecordLog
from pipelines.evaluation.sampling import Draws, Sampling
from pipelines.harness.loading import arguments, batch_size, load
from pipelines.run.progress import Meter

DEFAULT_NEW_TOKENS = 256
"""Of an answer for which the task sets no limit; the harness's own default."""


@register_model("deltamem")
class DeltaMemLM(TemplateLM):
    """A δ-mem model, or any causal language model of transformers, behind the harness's interface.

    Args:
        batch_size: requests in a pass.
        log: keeps answers as they come; a request that it has isn't asked again.
        console: where progress is told.
        sampling: how answers are drawn; None: they are greedy.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: DeltaMemModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        log: RecordLog | None = None,
        console: Console | None = None,
        sampling: Sampling | None = None,
    ):
        super().__init__()
        self.tokenizer, self.batch_size, self.log, self.sampling = tokenizer, batch_size, log, sampling
        self.console = console or Console(stderr=True, soft_wrap=True)
        base = backbone_of(model)
        self.max_length, self.segment = facts.window(base.config), segment_of(model)
        pad = tokenizer.pad_token_id
        self.reader = reader_of(
            model, sorted(facts.end_ids(base, tokenizer)), tokenizer.eos_token_id if pad is None else pad
        )
        self.shortened: set[str] = set()
        """Prompts whose beginning was left out because the window is too short."""
        self._chats: dict[str, tuple[list[dict[str, str]], bool]] = {}
        """What went through the chat template, and whether the prompt for an answer follows, by the text it became."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> DeltaMemLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> DeltaMemLM:
        """From the keys of ``--model_args`` and the harness's own options."""
        options = additional_config or {}
        size = batch_size(options.get("batch_size"))
        return cls(*load(**arguments(arg_dict, options.get("device"))), batch_size=size)

    # --- tokens -------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **TEMPLATE_OPTIONS,
        )
        rendered = cast(str, text)
        self._chats[rendered] = chat_history, add_generation_prompt
        return rendered

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if string in self._chats:
            return self._encode_chat(string).input_ids
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos is not None and string.startswith(bos))
        return self._plain(string, add_special_tokens)

    def _plain(self, string: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A chat and its continuation, which gets the white space at the chat's end, as the harness has it."""
        if context not in self._chats:
            return super()._encode_pair(context, continuation)
        start = self._plain(context.rstrip())
        spaces = len(self._plain(context)) - len(start)
        chat = self._encode_chat(context).input_ids
        return chat[: len(chat) - spaces], self._plain(context + continuation)[len(start) :]

    def _encode_chat(self, text: str) -> EncodedMessages:
        """A text that came out of the chat template, as every chat of the project is encoded.

        Raises:
            DeltaMemError: the memory is written by segments, and the template changes the messages.
        """
        chat, is_complete = self._chats[text]
        encoded = encode_messages(self.tokenizer, chat, is_complete, self.segment)
        # what isn't complete goes on within the last message, which the encoding ends
        kept = len(encoded.input_ids) if is_complete else len(self._plain(text))
        return EncodedMessages(encoded.input_ids[:kept], encoded.segment_ids[:kept])

    def _prompt(self, text: str | None, ids: list[int], room: int) -> EncodedMessages:
        """The last tokens of a prompt that leave ``room`` in the window, with their segments.

        Segments are the messages of a prompt that went through the chat template; any other is one segment.
        """
        segments = self._encode_chat(text).segment_ids[: len(ids)] if text in self._chats else [0] * len(ids)
        keep = self.max_length - room
        if keep < 1:
            raise DeltaMemError(f"an answer of {room} tokens leaves no room for a prompt in {self.max_length}")
        if len(ids) > keep and text is not None:
            self.shortened.add(text)
        return EncodedMessages(ids[-keep:], segments[-keep:])

    # --- requests -----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def score(batch: list[int]) -> list[list]:
            prompts = []
            for texts, context, continuation in (requests[i] for i in batch):
                room = len(continuation) - 1  # the last token is not fed
                prompts.append(self._prompt(texts and texts[0], context, room))
            rows, last = self._read(prompts)
            answers = [requests[i][2] for i in batch]
            logits, targets = self.reader.answer_logits(rows, last, answers, write=True)
            chosen = logits.log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
            counts = targets >= 0
            sums = (chosen * counts).sum(1).tolist()
            greedy = ((logits.argmax(-1) == targets) | ~counts).all(1).tolist()
            return [list(pair) for pair in zip(sums, greedy, strict=True)]

        tokens = [[context, continuation] for _, context, continuation in requests]
        lengths = [len(context) + len(continuation) for context, continuation in tokens]
        return [tuple(answer) for answer in self._batched("loglikelihood", tokens, lengths, score)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Windows of a text that is longer than the model's start with an empty memory each."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, limits, stops = [], [], []
        for text, options in (request.args for request in requests):
            options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
            if options.get("do_sample") and self.sampling is None:
                raise DeltaMemError(
                    "this task samples its answers, and this model answers greedily; add --gen_kwargs do_sample=False"
                )
            limits.append(options["max_gen_toks"])
            stops.append(options["until"])
            prompts.append(self._prompt(text, self.tok_encode(text), limits[-1]))

        def answer(batch: list[int]) -> list[str]:
            rows, last = self._read([prompts[i] for i in batch])
            draws = self.sampling and Draws(self.sampling, [requests[i].args[0] for i in batch])
            generated = self.reader.generate(rows, last, [limits[i] for i in batch], True, draws)
            texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
            return [postprocess_generated_text(text, stops[i], None) for i, text in zip(batch, texts, strict=True)]

        asked = [[request.args[0], limit, stop] for request, limit, stop in zip(requests, limits, stops, strict=True)]
        return self._batched("generate_until", asked, [len(prompt.input_ids) for prompt in prompts], answer)

    def _read(self, prompts: Sequence[EncodedMessages]) -> tuple[Rows, list[int]]:
        """Reads all but the last token of each prompt; the rows, and these last tokens."""
        body = [EncodedMessages(prompt.input_ids[:-1], prompt.segment_ids[:-1]) for prompt in prompts]
        rows = self.reader.read(self.reader.start(len(prompts)), body, write=True)
        return rows, [prompt.input_ids[-1] for prompt in prompts]

    def _batched(
        self, kind: str, requests: Sequence[Any], lengths: Sequence[int], answer: Callable[[list[int]], list]
    ) -> list[Any]:
        """The answers to all requests, the longest first: what is too much for the machine fails at once.

        Args:
            requests: what tells one request from another, as JSON.
            answer: answers the requests of these numbers.
        """
        keys = [hashlib.sha256(json.dumps([kind, request]).encode()).hexdigest() for request in requests]
        known = {record["question_id"]: record["answer"] for record in self.log.records} if self.log else {}
        waiting = [number for number, key in enumerate(keys) if key not in known]
        waiting.sort(key=lambda number: -lengths[number])
        with Meter(len(waiting), self.console) as meter:
            meter.step(kind)
            for start in range(0, len(waiting), self.batch_size):
                batch = waiting[start : start + self.batch_size]
                with self.reader.cost("full") as cost:
                    answers = answer(batch)
                new = {keys[number]: given for number, given in zip(batch, answers, strict=True)}
                known |= new
                if self.log:
                    self.log.add(
                        [{"question_id": key, "condition": kind, "answer": given} for key, given in new.items()],
                        cost,
                    )
                meter.advance(len(batch))
        return [known[key] for key in keys]


def main() -> None:
    """The harness's command line; importing this module is what makes it know the model."""
    try:
        cli_evaluate()
    except DeltaMemError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
