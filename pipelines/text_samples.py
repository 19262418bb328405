"""Made-up texts that differ: what engines are timed and compared on."""

import random

from modalkit.pipelines.tokenization import TextEncoder

SAMPLE_SHAPES = (
    *((1, 10), (1, 32), (2, 16), (4, 12), (4, 32), (4, 64), (8, 24), (8, 48)),
    *((32, 8), (32, 12), (32, 16), (16, 24), (16, 32), (16, 48), (16, 64), (16, 96)),
)
"""Batches as a service has them: the number of texts, and the tokens of the longest."""

VOCABULARY_WORDS = 20_000
SEED = 13


def varied_texts(encoder: TextEncoder, max_length: int) -> list[list[str]]:
    """A batch of random words of the vocabulary for each of `SAMPLE_SHAPES`, the same ones at each call.

    The texts of a batch have different lengths, so that padding is tried too; none has more than `max_length` tokens.
    """
    chance = random.Random(SEED)  # noqa: S311  # no secret
    words = [word for word in encoder.vocabulary(VOCABULARY_WORDS) if len(word) > 1 and word.isalpha()] or ["a", "b"]

    def text(tokens: int) -> str:
        return " ".join(chance.choices(words, k=max(1, tokens - encoder.special_tokens)))

    batches = []
    for count, length in SAMPLE_SHAPES:
        longest = min(length, max_length)
        batches.append([text(longest if i == 0 else chance.randint(longest // 2, longest)) for i in range(count)])
    return batches
