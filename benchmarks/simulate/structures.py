"""Devices with many structures of costs, for which the scheduler must work without being tuned for them.

Each structure says what a batch of `count` requests costs, whose largest has size `longest` and whose sizes sum to
`total`; a `CostedDevice` adds what changes while it runs: noise, outliers, drift, a slow start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modalkit.batching import CostFeature
from modalkit.benchmarks.simulate.tables import DEVICES, load_table
from modalkit.benchmarks.simulate.workload import draw_sizes

Seconds = Callable[[int, int, int], float]
DrawSizes = Callable[[int, np.random.Generator], NDArray[np.int64]]

OUTLIER_FACTOR = 20.0
SLOW_START_FACTOR = 100.0
SLOW_START_BATCHES = 3
SLOW_START_SIZE = 32
DRIFT_FACTOR = 3.0
DRIFT_AFTER_ITEMS = 1_000


def _uniform(smallest: int, largest: int) -> DrawSizes:
    return lambda count, random: random.integers(smallest, largest + 1, count)


def _two_kinds(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    return np.where(random.random(count) < 0.8, 8, 512).astype(np.int64)


def _heavy_tail(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    return np.clip(random.pareto(1.1, count) * 10 + 4, 4, 4096).astype(np.int64)


SIZE_MIXES: dict[str, DrawSizes] = {
    "none": _uniform(1, 1),
    "equal": _uniform(20, 20),
    "texts": draw_sizes,
    "uniform": _uniform(1, 2000),
    "two kinds": _two_kinds,
    "heavy tail": _heavy_tail,
    "pixels": _uniform(50_000, 2_000_000),
}
"""Distributions of request sizes; `texts` is that of the corpus of mixed lengths."""


@dataclass(frozen=True)
class Structure:
    """The seconds of batches, the size distributions that it is tried with, and how it changes while it runs."""

    name: str
    seconds: Seconds
    mixes: tuple[str, ...] = ("texts",)
    feature: CostFeature = CostFeature.PADDED
    """The feature that the pipeline declares, which may be wrong."""
    noise: float = 0.0
    """The standard deviation of the logarithm of a batch's time."""
    outliers: float = 0.0
    """The share of batches that take 20 times as long."""
    slow_start: bool = False
    """Whether each of the first three batches takes longer by 100 small batches: compilation, cold caches."""
    drift: float = 1.0
    """The factor of the seconds of batches after the first 1,000 items."""


@dataclass
class CostedDevice:
    """A device of a structure, which runs one batch after the other."""

    structure: Structure
    random: np.random.Generator
    done: int = 0
    batches: int = 0
    expected_s: float = 0.0

    def __call__(self, count: int, longest: int, total: int) -> float:
        """The seconds of the next batch. `expected_s` is the sum of all seconds, without noise and outliers."""
        structure = self.structure
        seconds = structure.seconds(count, longest, total)
        if structure.slow_start and self.batches < SLOW_START_BATCHES:
            seconds += SLOW_START_FACTOR * structure.seconds(1, SLOW_START_SIZE, SLOW_START_SIZE)
        if self.done >= DRIFT_AFTER_ITEMS:
            seconds *= structure.drift
        self.expected_s += seconds
        if structure.noise:
            seconds *= math.exp(self.random.normal(-(structure.noise**2) / 2, structure.noise))
        if structure.outliers and self.random.random() < structure.outliers:
            seconds *= OUTLIER_FACTOR
        self.batches += 1
        self.done += count
        return seconds


def fixed_s(seconds: float) -> Seconds:
    """Each batch takes `seconds`."""
    return lambda count, longest, total: seconds  # noqa: ARG005  # the arguments have no influence


def linear(batch_s: float = 0.0, item_s: float = 0.0, padded_s: float = 0.0, total_s: float = 0.0) -> Seconds:
    """A sum of seconds per batch, per item, per padded token and per real token."""
    return lambda count, longest, total: batch_s + item_s * count + padded_s * count * longest + total_s * total


def _attention(count: int, longest: int, total: int) -> float:  # noqa: ARG001  # one signature for all
    return 0.005 + 4e-5 * count * longest + 3e-7 * count * longest**2


def _square_of_count(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return 0.02 * (1 + (count / 8) ** 2)


def _root_of_count(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return 0.02 * math.sqrt(count)


def _tiles_of_items(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return 0.01 * math.ceil(count / 8)


def _tiles_of_tokens(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return 0.002 + 0.004 * math.ceil(count * longest / 1024)


def _flat_then_steep(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return max(0.004, 5e-6 * count * longest)


def _cliff_of_items(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return (0.01 + 0.001 * count) * (2 if count > 8 else 1)


def _cliff_of_tokens(count: int, longest: int, total: int) -> float:  # noqa: ARG001
    return (0.005 + 2e-5 * count * longest) * (2 if count * longest > 2048 else 1)


CPU_LIKE = linear(batch_s=0.005, padded_s=1e-4)
SIZED = ("equal", "texts", "uniform", "two kinds", "heavy tail")

STRUCTURES: tuple[Structure, ...] = (
    Structure("fixed 10 us", fixed_s(1e-5), ("none", "texts")),
    Structure("fixed 1 ms", fixed_s(1e-3), ("equal", "uniform")),
    Structure("fixed 0.3 s", fixed_s(0.3), ("equal",)),
    Structure("fixed 1 s", fixed_s(1.0), ("none", "equal", "texts", "pixels")),
    Structure("fixed 60 s", fixed_s(60.0), ("equal", "heavy tail")),
    Structure("1 s, 20 ms an item", linear(1.0, 0.02), ("none", "texts", "pixels")),
    Structure("10 us, 100 us an item", linear(1e-5, 1e-4), ("none", "texts")),
    Structure("1 ms an item", linear(0.0, 1e-3), ("none", "texts")),
    Structure("0.5 s, 0.05 ms a token", linear(0.5, padded_s=5e-5), SIZED),
    Structure("5 ms, 0.1 ms a token", CPU_LIKE, SIZED),
    Structure("0.1 ms a token", linear(padded_s=1e-4), ("texts", "heavy tail")),
    Structure("2 s, 1 us a pixel", linear(2.0, padded_s=1e-6), ("pixels",)),
    Structure("attention", _attention, SIZED),
    Structure("square of the items", _square_of_count, ("none", "texts")),
    Structure("root of the items", _root_of_count, ("none", "texts")),
    Structure("tiles of 8 items", _tiles_of_items, ("none", "texts")),
    Structure("tiles of 1,024 tokens", _tiles_of_tokens, ("texts", "uniform")),
    Structure("flat, then steep", _flat_then_steep, ("equal", "texts", "uniform")),
    Structure("2 x beyond 8 items", _cliff_of_items, ("none", "texts")),
    Structure("2 x beyond 2,048 tokens", _cliff_of_tokens, ("equal", "texts")),
    Structure("plain sum, declared padded", linear(0.01, total_s=1e-4), ("texts", "uniform", "heavy tail")),
    Structure("plain sum, declared so", linear(0.01, total_s=1e-4), ("texts", "heavy tail"), CostFeature.TOTAL),
    Structure("padded, declared plain sum", CPU_LIKE, ("equal", "texts"), CostFeature.TOTAL),
    Structure("noise of 30 %, outliers", CPU_LIKE, ("texts",), noise=0.3, outliers=0.02),
    Structure("noise of 30 %, outliers, 1 s", fixed_s(1.0), ("equal",), noise=0.3, outliers=0.02),
    Structure("3 x slower in mid-run", CPU_LIKE, ("texts",), drift=DRIFT_FACTOR),
    Structure("3 x faster in mid-run", linear(0.5, padded_s=5e-5), ("texts",), drift=1 / DRIFT_FACTOR),
    Structure("slow start", CPU_LIKE, ("texts",), slow_start=True),
    Structure("slow start, 1 s", fixed_s(1.0), ("equal", "texts"), slow_start=True),
    *(Structure(name, load_table(name).seconds, ("texts",), noise=0.05) for name in DEVICES),
)
