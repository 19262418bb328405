"""Measures the seconds of batches on this machine, and the sizes of texts, with the bundled model."""

import json
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from modalkit.benchmarks.simulate.tables import CostTable
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SIZES = (8, 16, 32, 64, 128, 256)


def measure(name: str, rounds: int) -> CostTable:
    """The median seconds of all stages of the bundled pipeline, for batches of texts of one length.

    Each round measures the whole grid. So a disturbance affects one round of some shapes, not all rounds of one shape.
    """
    pipeline = SentimentPipeline("measured", str(Path.cwd()), {})
    shapes = {(count, size): pipeline.sample_items(count, size) for count in BATCH_SIZES for size in SIZES}
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for current in range(rounds + 1):
        for shape, items in shapes.items():
            started_s = time.perf_counter()
            pipeline.run_inference(items)
            if current:  # round 0 is the warm-up
                seconds[shape].append(time.perf_counter() - started_s)
    return CostTable(
        name=name,
        source=f"The bundled model, all stages, median of {rounds} rounds; "
        "python -m modalkit.benchmarks.simulate measure",
        batch_sizes=BATCH_SIZES,
        sizes=SIZES,
        seconds_at=[[statistics.median(seconds[count, size]) for size in SIZES] for count in BATCH_SIZES],
    )


def sizes_as_json(texts: Iterable[str], source: str) -> str:
    """The number of texts of each size, as estimated by the bundled pipeline, in the format of `sizes.json`."""
    pipeline = SentimentPipeline("sized", str(Path.cwd()), {})
    counts = Counter(pipeline.item_size(SentimentRequest(text=text)) for text in texts)
    lines = textwrap.fill(", ".join(f'"{size}": {counts[size]}' for size in sorted(counts)), 116)
    return f'{{\n  "source": {json.dumps(source)},\n  "counts": {{\n{textwrap.indent(lines, "    ")}\n  }}\n}}\n'
