"""The tokens of a text are counted right for every kind of tokenizer, in bounded time and memory."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modalkit.pipelines import token_counter
from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.token_counter import TokenCounter
from modalkit.pipelines.tokenization import TextEncoder
from modalkit.pipelines.training.data import Sentence

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(AutoTokenizer.from_pretrained(BUNDLED_FOLDER), 128)


def trained(kind: str, texts: list[str]) -> PreTrainedTokenizerBase:
    """A tokenizer like RoBERTa's (bytes) or XLM-RoBERTa's (pieces), trained on `texts`."""
    trainer: trainers.Trainer
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=2000, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    )


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_other_tokenizers_are_counted_nearly_as_well(kind: str, held_out: list[Sentence]) -> None:
    texts = [sentence.text for sentence in held_out[:1000]]
    encoder = TextEncoder(trained(kind, texts), 512)
    counter = TokenCounter(encoder)
    true = [len(ids) for ids in encoder.encode(texts).ids]
    errors = sorted(abs(counter.count(text) - length) for text, length in zip(texts, true, strict=True))
    assert sum(errors) / sum(true) < 0.02


def test_a_tokenizer_that_is_written_in_python_is_counted_too(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    counter = TokenCounter(TextEncoder(tokenizer, 128))
    monkeypatch.undo()
    text = "What an uncharacteristically lovely day!"
    assert counter.count(text.lower()) == TokenCounter(encoder).count(text)


def test_words_of_a_text_beyond_a_limit_are_estimated(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    lengths = encoder.word_lengths

    def noting(words: list[str]) -> list[int]:
        looked_up.extend(words)
        return lengths(words)

    counter = TokenCounter(encoder)
    monkeypatch.setattr(encoder, "word_lengths", noting)
    unknown = [f"qz{'xkj'[i % 3]}{i}" for i in range(100)]
    assert 100 < counter.count(" ".join(unknown)) <= 128
    assert looked_up == unknown[: token_counter.MAX_NEW_WORDS]
    assert counter.count(" ".join(unknown[:5])) == len(encoder.encode([" ".join(unknown[:5])]).ids[0])


def test_memory_is_bounded(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counter, "VOCABULARY_WORDS", 50)
    monkeypatch.setattr(token_counter, "MAX_REMEMBERED_WORDS", 100)
    counter = TokenCounter(encoder)
    for i in range(1000):
        assert counter.count(f"zq{i}") == len(encoder.encode([f"zq{i}"]).ids[0])
    assert len(counter._known) <= 100  # noqa: SLF001  # no public view of what a leak would fill


@pytest.mark.parametrize("text", ["x" * 100_000, "字" * 100_000, "x " * 50_000, "\x00" * 1000, " "])
def test_no_text_is_shorter_than_one_token_or_longer_than_the_limit(encoder: TextEncoder, text: str) -> None:
    assert 1 <= TokenCounter(encoder).count(text) <= 128
