"""The matrix of `modalkit.benchmarks.modal_gpu`, in this process: ``python -m modalkit.benchmarks.containers``."""

from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console

from modalkit.benchmarks.containers.here import opening_here
from modalkit.benchmarks.containers.load import measure_variant
from modalkit.benchmarks.containers.matrix import parse_matrix
from modalkit.benchmarks.containers.report import Results
from modalkit.benchmarks.corpus import mixed_length_texts

HERE = "here"


def main(
    batch_sizes: Annotated[str, typer.Option(help="Batch limits.")] = "8,32",
    concurrency: Annotated[str, typer.Option(help="Numbers of callers.")] = "8,64,512",
    seconds: Annotated[float, typer.Option(help="How long callers send, in each cell.")] = 5.0,
    model: Annotated[str | None, typer.Option(help="A model of the configuration; the first if left out.")] = None,
    output: Annotated[Path, typer.Option(help="The folder for results.json and results.png.")] = Path("gpu-matrix"),
    records: Annotated[bool, typer.Option("--records", help="Keep the record of each batch.")] = False,
) -> None:
    """Measure the service class in this process, on whatever device the model is on."""
    try:
        matrix = parse_matrix(HERE, batch_sizes, concurrency, seconds, keeps_records=records)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    results, texts = Results(matrix, {"app": HERE, "model": model}, output), mixed_length_texts()
    for variant in matrix.variants():
        print(f"batches of at most {variant.max_batch_size}")
        results.add(anyio.run(measure_variant, variant, matrix.load, opening_here(model), texts))
    results.print(Console(width=120))


if __name__ == "__main__":
    typer.run(main)
