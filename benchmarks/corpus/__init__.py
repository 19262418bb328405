"""The committed corpus of mixed-length texts: what batching is measured with."""

import gzip
from importlib.resources import files

from modalkit.benchmarks.corpus.build import FILE_NAME


def mixed_length_texts(limit: int | None = None) -> list[str]:
    """The 4,000 texts, or the first `limit` of them; any number of the first ones has about the same mix of lengths."""
    packed = (files("modalkit.benchmarks.corpus") / FILE_NAME).read_bytes()
    return gzip.decompress(packed).decode("utf-8").removesuffix("\n").split("\n")[:limit]
