"""The seconds of batches on a device, measured or published, on a grid of batch sizes and lengths."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise

CPU = "cpu-2-cores"
DEVICES = (CPU, "t4-torchscript", "t4-fastertransformer", "v100-torchscript", "a100-torchscript")


@dataclass(frozen=True)
class CostTable:
    """Seconds of a batch by its number of requests and its longest one, to which the others are padded.

    Between the points of the grid the logarithm of the seconds is bilinear in the logarithms of both. Outside the grid
    the slope of the outermost cell continues, limited to 0 (a larger batch is not cheaper) and 1 (nor more expensive
    than in proportion). Nothing is cheaper than the first point of the grid. Raises `ValueError` for an invalid grid.
    """

    name: str
    source: str
    batch_sizes: Sequence[int]
    sizes: Sequence[int]
    seconds_at: Sequence[Sequence[float]]
    """A row for each batch size, in it a value for each size."""
    _known: dict[tuple[int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, points in (("batch_sizes", self.batch_sizes), ("sizes", self.sizes)):
            if len(points) < 2 or points[0] < 1 or any(a >= b for a, b in pairwise(points)):
                raise ValueError(f"{self.name}: {name} must be two or more rising numbers from 1, got {points!r}")
        if [len(row) for row in self.seconds_at] != [len(self.sizes)] * len(self.batch_sizes):
            raise ValueError(
                f"{self.name}: expected {len(self.batch_sizes)} rows of {len(self.sizes)} seconds, got rows of "
                f"{[len(row) for row in self.seconds_at]}"
            )
        if not all(0 < seconds < math.inf for row in self.seconds_at for seconds in row):
            raise ValueError(f"{self.name}: all seconds must be positive")

    def seconds(self, count: int, longest: int, total: int = 0) -> float:  # noqa: ARG002  # padding hides the total
        """Seconds of a batch of `count` requests padded to `longest`."""
        key = count, longest
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = self._interpolated(count, longest)
        return seconds

    def _interpolated(self, count: int, longest: int) -> float:
        row, column = _cell(self.batch_sizes, count), _cell(self.sizes, longest)
        by_size = [
            _on_line(
                self.sizes[column : column + 2], [math.log(s) for s in self.seconds_at[i][column : column + 2]], longest
            )
            for i in (row, row + 1)
        ]
        seconds = math.exp(_on_line(self.batch_sizes[row : row + 2], by_size, count))
        if count < self.batch_sizes[0] or longest < self.sizes[0]:
            return max(seconds, self.seconds_at[0][0])
        return seconds


def _cell(points: Sequence[int], value: int) -> int:
    return min(max(bisect_right(points, value) - 1, 0), len(points) - 2)


def _on_line(ends: Sequence[int], values: Sequence[float], at: int) -> float:
    """The value at `at` on the line between two points, beyond which its slope is limited."""
    left, right = map(math.log, ends)
    slope = (values[1] - values[0]) / (right - left)
    if ends[0] <= at <= ends[1]:
        return values[0] + slope * (math.log(at) - left)
    slope = min(max(slope, 0.0), 1.0)
    return values[0] - slope * (left - math.log(at)) if at < ends[0] else values[1] + slope * (math.log(at) - right)


def load_table(name: str) -> CostTable:
    """The committed table of that name. Raises `ValueError` if there is none."""
    file = files("modalkit.benchmarks.simulate") / "tables" / f"{name}.json"
    if name not in DEVICES:
        raise ValueError(f"no cost table is called {name!r}; there are {', '.join(DEVICES)}")
    return table_from_json(file.read_text(encoding="utf-8"))


def table_from_json(text: str) -> CostTable:
    """The table that `table_to_json` wrote."""
    stored = json.loads(text)
    return CostTable(
        name=stored["name"],
        source=stored["source"],
        batch_sizes=stored["batch_sizes"],
        sizes=stored["sizes"],
        seconds_at=[[milliseconds / 1000 for milliseconds in row] for row in stored["milliseconds"]],
    )


def table_to_json(table: CostTable) -> str:
    """The table as text, a line for each batch size."""
    rows = ",\n    ".join(json.dumps([round(seconds * 1000, 3) for seconds in row]) for row in table.seconds_at)
    head = {"name": table.name, "source": table.source, "batch_sizes": table.batch_sizes, "sizes": table.sizes}
    fields = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    return "{\n" + ",\n".join([*fields, f'  "milliseconds": [\n    {rows}\n  ]']) + "\n}\n"
