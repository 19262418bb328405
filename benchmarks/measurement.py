"""Measures several contenders side by side: each once per round, and ratios within each round."""

import gc
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

Contender = Callable[[], Mapping[str, float]]
"""Does the work once in one way, and returns what it measured, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a run: the median of its rounds."""

    name: str
    rounds: tuple[float, ...]
    unit: str = "x"
    at_most: float | None = None
    """The target, if less is better."""
    at_least: float | None = None
    """The target, if more is better."""

    @property
    def value(self) -> float:
        """The median; NaN if nothing was measured."""
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without a target, or if nothing was measured."""
        if not self.rounds:
            return None
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


class Study(Protocol):
    """A set of figures that is measured in rounds."""

    name: str

    def warm_up(self) -> None:
        """Run once before the rounds, without counting it."""
        ...  # a protocol method has no body

    def run_round(self) -> None:
        """Measure each contender once."""
        ...

    def figures(self) -> list[Figure]:
        """The figures of the rounds so far."""
        ...


def in_own_thread(function: Callable[[], T]) -> T:
    """Call a function in a new thread that ends before the return, together with the OpenMP threads of torch.

    Threads that stay would slow down the other contenders: with more OpenMP threads than cores, libgomp sleeps between
    parallel regions instead of spinning, and a batch of the bundled model takes 15 % longer.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


class Rounds:
    """The values of several contenders, one of each per round."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self._contenders = list(contenders)
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Measure each contender once, in its own thread. The order changes each round, so that drift cancels out."""
        for contender in self._contenders:
            gc.collect()  # so that the garbage of one contender costs another one no time
            for name, value in in_own_thread(contender).items():
                if not math.isnan(value):  # there was too little work to measure it
                    self._values[name].append(value)
        self._contenders.reverse()

    def figure(
        self, value: str, name: str, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """A measured value as a figure called `name`."""
        return Figure(name=name, rounds=tuple(self._values[value]), unit=unit, at_most=at_most, at_least=at_least)

    def ratio(
        self, value: str, base: str, name: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """The ratio of `value` to `base`, round by round."""
        pairs = zip(self._values[value], self._values[base], strict=True)
        return Figure(name=name, rounds=tuple(a / b for a, b in pairs), at_most=at_most, at_least=at_least)
