"""LLMLingua-2: a small classifier keeps the words that matter (Pan et al. 2024, arXiv 2403.12968).

It doesn't look at the question, so that one compressed history serves all questions of a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipelines.benchmarks.base import Context
from pipelines.config.strategies import LlmLingua2Strategy
from pipelines.data.files import from_hub
from pipelines.strategies.transform import ContextTransform, Summarise


class LlmLingua2(ContextTransform[LlmLingua2Strategy]):
    """The package's compressor.

    Raises:
        StageError: the classifier, or the word counts that the package downloads, can't be had.
    """

    def __init__(self, settings: LlmLingua2Strategy, summarise: Summarise, device: str) -> None:
        from llmlingua import PromptCompressor

        super().__init__(settings, summarise, device)
        self._compressor = from_hub(
            f"LLMLingua-2's classifier {settings.model}",
            "give a folder that holds it as 'model'; the package's tokenizer (tiktoken) must be in its cache",
            lambda: PromptCompressor(
                settings.model,
                device_map=device,
                use_llmlingua2=True,
                model_config={"trust_remote_code": False},  # the package's default is to run the Hub's code
            ),
        )

    def __call__(self, context: Context) -> Iterator[Context]:
        texts = [message["content"] for message in context.history]
        if not texts:
            yield context
            return
        # line breaks are kept, because they set dates and titles apart from what they stand above
        found = self._compressor.compress_prompt_llmlingua2(texts, rate=self.settings.rate, force_tokens=["\n"])
        history = [
            {**message, "content": text}
            for message, text in zip(context.history, found["compressed_prompt_list"], strict=True)
            if text.strip()
        ]
        yield replace(context, history=history)
