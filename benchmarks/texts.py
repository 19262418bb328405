"""Texts to measure with."""

from pathlib import Path

from pipelines.training.data import fetch_sentences, load_sentences

FILM_REVIEWS = "movieReviewSnippets"


def film_review_snippets(limit: int | None = None) -> list[str]:
    """The 10,605 snippets of film reviews in the training data, in their order there: downloaded once, then cached."""
    sentences = load_sentences(fetch_sentences(Path(".cache/training")))
    return [sentence.text for sentence in sentences if sentence.source == FILM_REVIEWS][:limit]


def read_texts(path: Path | None, limit: int | None) -> list[str]:
    """The lines of a file that are not blank, or the film-review snippets."""
    if path is None:
        return film_review_snippets(limit)
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
