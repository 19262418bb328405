"""Turns texts into token ids for one model, truncated to its limit, on any thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

MIN_PARALLEL_WORDS = 32  # fewer words are encoded faster one by one than by the tokenizer's threads


TextOrPair = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The tokens of a batch of texts, not padded; `type_ids` is None if they are all 0."""

    ids: list[list[int]]
    type_ids: list[list[int]] | None
    truncated: list[bool]
    encodings: Sequence[Any] = ()
    """What the library `tokenizers` returned, with the places of tokens; only for an encoder `with_offsets`."""


class TextEncoder:
    """Tokenizes for a model that takes at most `max_length` tokens, special tokens included.

    No other code may call the tokenizer afterwards: ``tokenizer(text)`` would change the truncation that is set here
    once, and would fail from another thread. `encode` may be called from several threads at once. `of_pairs` is for
    pairs of texts, of which the longer one is truncated; `with_offsets` for the places of tokens in the text.

    Raises `ValueError` if `max_length` leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        of_pairs: bool = False,
        with_offsets: bool = False,
    ) -> None:
        self.max_length = max_length
        self.in_parallel = True
        """Whether the texts of a batch are encoded on all cores: beside a model that computes there, that is slower."""
        self.special_tokens = tokenizer.num_special_tokens_to_add(pair=of_pairs)
        if max_length <= self.special_tokens:
            raise ValueError(
                f"max_length {max_length} leaves no room for text: {self.special_tokens} tokens are the tokenizer's own"
            )
        self._tokenizer = tokenizer
        self._of_pairs, self._with_offsets = of_pairs, with_offsets
        self.encode: Callable[[Sequence[TextOrPair]], EncodedTexts] = (
            self._fast_encoder(tokenizer) if tokenizer.is_fast else self._python_encoder(tokenizer)
        )

    @property
    def lowercases(self) -> bool:
        """Whether the tokenizer ignores the case of letters."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer if self._tokenizer.is_fast else None
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    def vocabulary(self, count: int) -> list[str]:
        """The first `count` entries of the vocabulary, without the mark for the beginning of a word."""
        by_id = sorted(self._tokenizer.get_vocab().items(), key=itemgetter(1))
        return [word.lstrip("Ġ▁") for word, _ in by_id[:count]]

    def word_lengths(self, words: list[str]) -> list[int]:
        """How many tokens each word has in a text, after a space."""
        spaced = [f" {word}" for word in words]
        if not self._tokenizer.is_fast:
            return [len(self._tokenizer.tokenize(word)) for word in spaced]
        backend = self._tokenizer.backend_tokenizer
        if len(spaced) < MIN_PARALLEL_WORDS:
            return [len(backend.encode(word, add_special_tokens=False).ids) for word in spaced]
        return [len(encoding.ids) for encoding in backend.encode_batch(spaced, add_special_tokens=False)]

    def _fast_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[TextOrPair]], EncodedTexts]:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        # The fast variant leaves out the offsets of tokens in the text, which a classifier does not need.
        fast = None if self._with_offsets else getattr(backend, "encode_batch_fast", None)
        encode_batch = fast or backend.encode_batch
        typed = any(backend.encode("a", "a" if self._of_pairs else None).type_ids)

        def encode(texts: Sequence[TextOrPair]) -> EncodedTexts:
            encodings = encode_batch(texts) if self.in_parallel else [encode_batch([text])[0] for text in texts]
            return EncodedTexts(
                ids=[encoding.ids for encoding in encodings],
                type_ids=[encoding.type_ids for encoding in encodings] if typed else None,
                # Only a text that fills the limit can have an overflow, and `overflowing` makes a copy.
                truncated=[len(e) >= self.max_length and bool(e.overflowing) for e in encodings],
                encodings=encodings if self._with_offsets else (),
            )

        return encode

    def _python_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[TextOrPair]], EncodedTexts]:
        """The encoder for the few models whose tokenizer exists in Python only, such as BERTweet."""

        def encode(texts: Sequence[TextOrPair]) -> EncodedTexts:
            parts = [(text,) if isinstance(text, str) else text for text in texts]
            encoded = tokenizer(
                *(list(column) for column in zip(*parts, strict=True)),
                truncation=True,
                max_length=self.max_length,
                return_token_type_ids=True,
            )
            ids, type_ids = encoded["input_ids"], encoded["token_type_ids"]
            return EncodedTexts(
                ids=ids,
                type_ids=type_ids if any(map(any, type_ids)) else None,
                truncated=[
                    len(row) >= self.max_length
                    and sum(len(tokenizer.tokenize(part)) for part in texts) + self.special_tokens > self.max_length
                    for row, texts in zip(ids, parts, strict=True)
                ],
            )

        return encode
