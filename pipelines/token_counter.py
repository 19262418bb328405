"""Tells how many tokens a text has in some microseconds, by remembering the tokens of words."""

import re
from itertools import islice
from typing import cast

from modalkit.pipelines.tokenization import TextEncoder

VOCABULARY_WORDS = 20_000
REMEMBERED_WORDS = 200_000
UNKNOWN_WORDS_A_TEXT = 16
CHARACTERS_PER_TOKEN = 4  # in words that are not looked up

WORDS_AND_MARKS = re.compile(r"\w{1,32}|[^\w\s]")
WHAT_SPACES_SEPARATE = re.compile(r"\S{1,32}")
MARKED_WORDS = ["well,", "don't", "(good)", "2.5", '"no!"', "up-to-date..."]


class TokenCounter:
    """Counts the tokens of texts for one tokenizer; not thread-safe, though the tokenizer may be in use elsewhere.

    A text is as long as what its spaces separate. Where the tokenizer treats punctuation marks as words of their own,
    as BERT's does, so do we, which leaves fewer words to remember. Words of the vocabulary are looked up once at the
    start, others when they first come, some ten microseconds each; those of a text beyond a limit are estimated by
    their characters.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, int] = {}
        self._words = (WORDS_AND_MARKS if self._marks_are_words() else WHAT_SPACES_SEPARATE).findall
        self._learn([word for word in encoder.vocabulary(VOCABULARY_WORDS) if word.isalnum()])

    def count(self, text: str) -> int:
        """The tokens of a text that the model reads, special tokens included: from 1 to the encoder's `max_length`."""
        # Hardly a token has more characters than that: what lies beyond would not change the answer.
        text = text[: 10 * self._encoder.max_length]
        words = self._words(text.lower() if self._encoder.lowercases else text)
        known: list[int | None] = list(map(self._known.get, words))
        tokens = self._look_up(words) if None in known else cast("list[int]", known)
        return min(self._encoder.special_tokens + sum(tokens), self._encoder.max_length) or 1

    def _marks_are_words(self) -> bool:
        apart = [sum(self._encoder.word_lengths(WORDS_AND_MARKS.findall(word))) for word in MARKED_WORDS]
        return apart == self._encoder.word_lengths(MARKED_WORDS)

    def _look_up(self, words: list[str]) -> list[int]:
        unknown = {word: None for word in words if word not in self._known}
        self._learn(list(islice(unknown, UNKNOWN_WORDS_A_TEXT)))
        return [self._known.get(word) or 1 + len(word) // CHARACTERS_PER_TOKEN for word in words]

    def _learn(self, words: list[str]) -> None:
        if len(self._known) + len(words) > REMEMBERED_WORDS:
            self._known.clear()
        self._known.update(zip(words, self._encoder.word_lengths(words), strict=True))
