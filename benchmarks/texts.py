"""The texts that benchmarks use."""

from pathlib import Path
from typing import Annotated

import typer

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.pipelines.training.data import fetch_sentences, load_sentences

CORPUS, FILMS = "corpus", "films"
FILM_REVIEWS = "movieReviewSnippets"

TextsOption = Annotated[
    str,
    typer.Option(
        "--texts",
        metavar=f"{CORPUS}|{FILMS}|FILE",
        help="The corpus of mixed lengths, film-review snippets (all short), or a file with one text per line.",
    ),
]


def film_review_snippets(limit: int | None = None) -> list[str]:
    """The 10,605 snippets of film reviews of the training data, in the same order. Downloaded once, then cached."""
    sentences = load_sentences(fetch_sentences(Path(".cache/training")))
    return [sentence.text for sentence in sentences if sentence.source == FILM_REVIEWS][:limit]


def read_texts(name: str, limit: int | None = None) -> list[str]:
    """The texts that `TextsOption` names; for a file, its lines that are not blank.

    Raises `typer.BadParameter` for a file that is missing, unreadable or empty.
    """
    if name == CORPUS:
        return mixed_length_texts(limit)
    if name == FILMS:
        return film_review_snippets(limit)
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--texts {name}: {error}; name a readable text file, {CORPUS} or {FILMS}") from error
    if not (texts := [line for line in lines if line.strip()]):
        raise typer.BadParameter(f"--texts {name}: the file has no text; write one per line")
    return texts[:limit]
