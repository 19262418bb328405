"""Counts the tokens of a text in some microseconds, from remembered token counts of words."""

import re
from itertools import islice
from typing import cast

from modalkit.pipelines.tokenization import TextEncoder

VOCABULARY_WORDS = 20_000
MAX_REMEMBERED_WORDS = 200_000
MAX_NEW_WORDS = 16  # that are looked up for one text
CHARACTERS_PER_TOKEN = 4  # in words that are not looked up

WORDS_AND_MARKS = re.compile(r"\w{1,32}|[^\w\s]")
WORDS_BETWEEN_SPACES = re.compile(r"\S{1,32}")
MARKED_WORDS = ["well,", "don't", "(good)", "2.5", '"no!"', "up-to-date..."]


class TokenCounter:
    """Counts the tokens of texts for one tokenizer. Not thread-safe, but other threads may use the tokenizer.

    The count of a text is the sum of the counts of its words, which spaces separate. If the tokenizer treats
    punctuation marks as words, as BERT's does, so does the counter; then there are fewer different words. Words of the
    vocabulary are looked up once at the start, others when they first occur, which takes about ten microseconds each.
    If a text has more than `MAX_NEW_WORDS` new words, the rest are estimated from their characters.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._lowercases = encoder.lowercases
        self._known: dict[str, int] = {}
        self._words = (WORDS_AND_MARKS if self._marks_are_words() else WORDS_BETWEEN_SPACES).findall
        self._learn([word for word in encoder.vocabulary(VOCABULARY_WORDS) if word.isalnum()])

    def count(self, text: str) -> int:
        """The tokens of a text that the model reads, special tokens included: from 1 to the encoder's `max_length`."""
        # Few tokens have more than 10 characters, so the text after that does not change the result.
        text = text[: 10 * self._encoder.max_length]
        words = self._words(text.lower() if self._lowercases else text)
        known: list[int | None] = list(map(self._known.get, words))
        tokens = self._look_up(words) if None in known else cast("list[int]", known)
        return min(self._encoder.special_tokens + sum(tokens), self._encoder.max_length) or 1

    def _marks_are_words(self) -> bool:
        apart = [sum(self._encoder.word_lengths(WORDS_AND_MARKS.findall(word))) for word in MARKED_WORDS]
        return apart == self._encoder.word_lengths(MARKED_WORDS)

    def _look_up(self, words: list[str]) -> list[int]:
        unknown = {word: None for word in words if word not in self._known}
        self._learn(list(islice(unknown, MAX_NEW_WORDS)))
        return [self._known.get(word) or 1 + len(word) // CHARACTERS_PER_TOKEN for word in words]

    def _learn(self, words: list[str]) -> None:
        if len(self._known) + len(words) > MAX_REMEMBERED_WORDS:
            self._known.clear()
        self._known.update(zip(words, self._encoder.word_lengths(words), strict=True))
