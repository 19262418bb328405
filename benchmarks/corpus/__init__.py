"""The committed corpus of texts of mixed lengths, for the benchmarks of batching."""

import gzip
from importlib.resources import files

from modalkit.benchmarks.corpus.build import FILE_NAME


def mixed_length_texts(limit: int | None = None) -> list[str]:
    """The first `limit` of the 4,000 texts, by default all. Any number of them has about the same mix of lengths."""
    packed = (files("modalkit.benchmarks.corpus") / FILE_NAME).read_bytes()
    return gzip.decompress(packed).decode("utf-8").removesuffix("\n").split("\n")[:limit]
