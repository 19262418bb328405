"""``python -m modalkit.pipelines.training``: train the bundled model again, and measure it."""

from pathlib import Path
from typing import Annotated

import typer

from modalkit.pipelines.errors import ModelLoadError
from modalkit.pipelines.loading import BUNDLED_FOLDER
from modalkit.pipelines.sentiment import SentimentPipeline
from modalkit.pipelines.training.data import Sentence, fetch_sentences, load_sentences, read_sentences
from modalkit.pipelines.training.evaluate import evaluate
from modalkit.pipelines.training.train import fine_tune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Cache = Annotated[Path, typer.Option(help="Where downloads are kept.")]
DEFAULT_CACHE = Path(".cache/training")


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
    engine: Annotated[str, typer.Option(help="The engine: auto, torch, torch-packed, openvino or onnx.")] = "torch",
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


if __name__ == "__main__":
    app()
