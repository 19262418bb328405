"""Builds texts of very different lengths from single sentences."""

import gzip
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from statistics import NormalDist

from modalkit.pipelines.training.data import Sentence

FILE_NAME = "mixed_length.txt.gz"
TEXTS, SEED = 4000, 3

# The target lengths in words: log-normal, with a 95th percentile of 4.5 times the median.
MEDIAN_WORDS = 23
SIGMA = math.log(104 / MEDIAN_WORDS) / NormalDist().inv_cdf(0.95)
MIN_WORDS, MAX_WORDS = 6, 210

MAX_FIRST_SENTENCE = 1.5  # times the target length: most sentences have more words than a short text may have


class TooFewSentencesError(ValueError):
    """Raised when a source is used up before all texts are built."""

    def __init__(self, source: str, built: int, wanted: int) -> None:
        super().__init__(f"{source} ran out of sentences after {built} of {wanted} texts: give it more, or build fewer")


class _Source:
    """The sentences of one source, read once from first to last."""

    def __init__(self, texts: list[str]) -> None:
        self._sentences = [(text, len(text.split())) for text in texts]
        self._next = 0

    @property
    def used_share(self) -> float:
        return self._next / len(self._sentences)

    def text_of(self, words: float) -> str:
        """Join the next sentences until one more would increase the distance to `words`; raises `IndexError`."""
        while self._sentences[self._next][1] > MAX_FIRST_SENTENCE * words:
            self._next += 1
        parts: list[str] = []
        length = 0
        while not parts or abs(length + self._sentences[self._next][1] - words) < abs(length - words):
            part, part_length = self._sentences[self._next]
            self._next += 1
            parts.append(part)
            length += part_length
        return " ".join(parts)


def build_texts(sentences: Iterable[Sentence], count: int = TEXTS, seed: int = SEED) -> list[str]:
    """Make `count` texts, each of consecutive whole sentences of one source; no sentence is used twice.

    The same sentences and `seed` give the same texts. Raises `TooFewSentencesError`.
    """
    by_source: defaultdict[str, list[str]] = defaultdict(list)
    for sentence in sentences:
        by_source[sentence.source].append(sentence.text)
    sources = {name: _Source(texts) for name, texts in by_source.items()}
    # Only random() gives the same numbers in all versions of Python.
    chance = random.Random(seed)  # noqa: S311  # texts are drawn, not secrets
    lengths = NormalDist(math.log(MEDIAN_WORDS), SIGMA)
    texts: list[str] = []
    while len(texts) < count:
        name, source = min(sources.items(), key=lambda entry: entry[1].used_share)
        aim = math.exp(lengths.inv_cdf(chance.random()))
        try:
            texts.append(source.text_of(min(max(MIN_WORDS, aim), MAX_WORDS)))
        except IndexError:
            raise TooFewSentencesError(name, len(texts), count) from None
    return texts


def pack(texts: list[str]) -> bytes:
    """One text per line, compressed; without the time, so that the same texts make the same file."""
    return gzip.compress("".join(f"{text}\n" for text in texts).encode(), compresslevel=9, mtime=0)
