"""``python -m modalkit.pipelines.training``: train the bundled model again, and measure it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from modalkit.pipelines.training.data import (
    LABELS,
    SOURCES,
    Sentence,
    fetch_sentences,
    load_sentences,
    read_sentences,
)
from modalkit.pipelines.training.train import fine_tune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Cache = Annotated[Path, typer.Option(help="Where downloads are kept.")]
DEFAULT_CACHE = Path(".cache/training")

BATCH_SIZE = 32
NEGATIVE, NEUTRAL, POSITIVE = range(len(LABELS))

Scored = tuple[Sentence, list[float]]
"""A sentence, and the probability of each of `LABELS`."""


def _sentences(cache: Path) -> list[Sentence]:
    cache.mkdir(parents=True, exist_ok=True)
    return load_sentences(fetch_sentences(cache))


@app.command("train")
def train_model(
    output: Annotated[Path, typer.Option(help="The folder to write the model to.")] = BUNDLED_FOLDER,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Fine-tune the model on the sentences that are not held out, then measure it on the others."""
    sentences = _sentences(cache)
    fine_tune(sentences, cache, output)
    _report(output, [sentence for sentence in sentences if sentence.held_out])


@app.command("evaluate")
def evaluate_model(
    model: Annotated[Path, typer.Argument(help="A folder with a model of the labels negative, neutral, positive.")] = (
        BUNDLED_FOLDER
    ),
    cache: Cache = DEFAULT_CACHE,
    engine: Annotated[str, typer.Option(help="The engine, as `engine` of a model's entry.")] = "torch",
    dtype: Annotated[str, typer.Option(help="The number format: auto, float32, bfloat16 or float16.")] = "float32",
    sentences: Annotated[
        Path | None, typer.Option(help="A file of sentences, as export-held-out writes it, in place of a download.")
    ] = None,
) -> None:
    """Measure a model on the held-out sentences, in the same way as it is served."""
    held_out = read_sentences(sentences) if sentences else [s for s in _sentences(cache) if s.held_out]
    _report(model, held_out, engine=engine, dtype=dtype)


@app.command()
def export_held_out(
    output: Annotated[Path, typer.Argument(help="The file to write: source, rating and text, separated by tabs.")],
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Write the held-out sentences into one file, as the tests use it."""
    held_out = [sentence for sentence in _sentences(cache) if sentence.held_out]
    output.write_text("".join(f"{s.source}\t{s.rating}\t{s.text}\n" for s in held_out), encoding="utf-8", newline="\n")
    print(f"wrote {len(held_out):,} sentences to {output}")


def _report(model: Path, sentences: list[Sentence], engine: str = "torch", dtype: str = "float32") -> None:
    try:
        pipeline = SentimentPipeline(
            "sentiment", "models", {}, model_path=str(model.resolve()), engine=engine, dtype=dtype
        )
        figures = evaluate(pipeline, sentences)
    except (ModelLoadError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(f"engine {pipeline.engine_choice}")
    print(
        "| held-out sentences | count | three-way accuracy | not neutral | polarity accuracy |\n|---|---|---|---|---|"
    )
    for name, found in figures.items():
        print(f"| {name} | {found.count:,} | {found.three_way:.3f} | {found.polar_count:,} | {found.polarity:.3f} |")


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of the model on some sentences."""

    count: int
    three_way: float
    """The share of all sentences whose most probable label is right."""
    polar_count: int
    polarity: float
    """Of the sentences that are not neutral, the share whose right pole has the higher probability of the two."""


def evaluate(pipeline: SentimentPipeline, sentences: Iterable[Sentence]) -> dict[str, Accuracy]:
    """The accuracy of a model with the labels `LABELS` by source, and over ``all``.

    Raises `ValueError` for a model with other labels.
    """
    if sorted(pipeline.labels) != sorted(LABELS):
        raise ValueError(f"the model must have the labels {', '.join(LABELS)}, it has {', '.join(pipeline.labels)}")
    columns = [pipeline.labels.index(label) for label in LABELS]
    by_length = sorted(sentences, key=lambda sentence: len(sentence.text))
    scored: list[Scored] = []
    for start in range(0, len(by_length), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        items: list[Any] = [SentimentRequest(text=sentence.text) for sentence in batch]
        probabilities = pipeline.predict(items, pipeline.preprocess(items))["probabilities"]
        scored += zip(batch, probabilities[:, columns].tolist(), strict=True)
    groups = {source: [pair for pair in scored if pair[0].source == source] for source in SOURCES}
    return {name: _accuracy(pairs) for name, pairs in {**groups, "all": scored}.items() if pairs}


def _accuracy(scored: list[Scored]) -> Accuracy:
    right = sum(given.index(max(given)) == sentence.label for sentence, given in scored)
    polar = [(sentence, given) for sentence, given in scored if sentence.label != NEUTRAL]
    right_pole = sum((given[POSITIVE] > given[NEGATIVE]) == (sentence.label == POSITIVE) for sentence, given in polar)
    return Accuracy(
        count=len(scored),
        three_way=right / len(scored),
        polar_count=len(polar),
        polarity=right_pole / len(polar) if polar else 0.0,
    )


if __name__ == "__main__":
    app()
