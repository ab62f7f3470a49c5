"""LLMLingua-2, with a small stand-in for its classifier."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertTokenizer,
)

from pipelines.benchmarks import Context
from pipelines.config.strategies import Bm25Strategy, LlmLingua2Strategy, MemoryBankStrategy
from pipelines.errors import StageError
from pipelines.strategies.compression import LlmLingua2
from pipelines.strategies.kinds import context_transform
from pipelines.strategies.memory_bank import MemoryBank
from pipelines.strategies.retrieval import Bm25
from tests.stories import context, no_summaries, texts


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A stand-in for LLMLingua-2's classifier that keeps words with an upper-case X and drops the others.

    The package tells by the folder's name which tokenizer it has to do with.
    """
    folder = tmp_path_factory.mktemp("classifier") / "bert-base-multilingual-cased-stand-in"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "drop", "Xkeep", "Xstay", "DATE", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=2,
    )
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1)
        for layer in model.bert.encoder.layer:
            layer.attention.output.LayerNorm.weight.fill_(1)
            layer.output.LayerNorm.weight.fill_(1)
        embedding = model.bert.embeddings.word_embeddings.weight
        embedding[:, 0] = torch.tensor([5.0 if word.startswith("X") else -5.0 for word in words])
        model.classifier.weight[1, 0] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def word_counts(monkeypatch):
    """tiktoken's real encoder over bytes, in place of the vocabulary that it would download."""
    import tiktoken

    encoder = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoder)


def test_llmlingua_keeps_the_words_that_the_classifier_wants(classifier, word_counts):
    compress = LlmLingua2(LlmLingua2Strategy(kind="llmlingua2", model=str(classifier), rate=0.5), no_summaries, "cpu")
    made = context("What?", "And what?")
    history = ["Xkeep drop Xstay drop drop", "drop drop Xkeep drop"]
    made = Context("c", [{"role": "user", "content": text} for text in history], made.questions)
    (short,) = compress(made)
    assert texts(short) == ["Xkeep Xstay", "Xkeep"]
    assert short.questions == made.questions
    assert list(compress(Context("c", [], made.questions))) == [Context("c", [], made.questions)]


def test_llmlinguas_classifier_out_of_reach_says_what_to_do(tmp_path, word_counts):
    settings = LlmLingua2Strategy(kind="llmlingua2", model=str(tmp_path / "none"))
    with pytest.raises(StageError, match="classifier.*give a folder that holds it as 'model'"):
        LlmLingua2(settings, no_summaries, "cpu")


def test_every_kind_has_its_transform(classifier, word_counts):
    kinds = {
        Bm25: Bm25Strategy(kind="bm25"),
        MemoryBank: MemoryBankStrategy(kind="memory_bank"),
        LlmLingua2: LlmLingua2Strategy(kind="llmlingua2", model=str(classifier)),
    }
    for made, strategy in kinds.items():
        assert isinstance(context_transform(strategy, no_summaries, "cpu"), made)
