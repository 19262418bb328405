"""Figures that are measured side by side: every way in turn, round after round, and their ratios round by round."""

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
"""Does the work once in one of several ways and returns what it measured, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a run; what counts is the median of its rounds."""

    name: str
    rounds: tuple[float, ...]
    unit: str = "x"
    at_most: float | None = None
    """The target, where less is better."""
    at_least: float | None = None
    """The target, where more is better."""

    @property
    def value(self) -> float:
        """The median; not a number where nothing was measured."""
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def is_met(self) -> bool | None:
        """Whether it reaches its target; None where it has none, or nothing was measured."""
        if not self.rounds:
            return None
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


class Study(Protocol):
    """Something measured in rounds."""

    name: str

    def warm_up(self) -> None:
        """Do once, uncounted, what the rounds do."""
        ...  # a protocol method has no body

    def run_round(self) -> None:
        """Measure every way once."""
        ...

    def figures(self) -> list[Figure]:
        """What the rounds so far amount to."""
        ...


def in_own_thread(function: Callable[[], T]) -> T:
    """Call a function in a new thread, which has ended on return, and with it the OpenMP threads that torch started.

    Those that stay slow the others down: with more OpenMP threads than cores, libgomp hardly spins between parallel
    regions, and a batch of the bundled model takes 15 % longer.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


class Rounds:
    """The values of several contenders, one of each a round."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self._contenders = list(contenders)
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Measure each once, in a thread of its own, and in the opposite order of the last round against drift."""
        for contender in self._contenders:
            gc.collect()  # nobody pays for what the one before left behind
            for name, value in in_own_thread(contender).items():
                if not math.isnan(value):  # the work was too little to measure this one
                    self._values[name].append(value)
        self._contenders.reverse()

    def figure(
        self, value: str, name: str, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """A value as it is, called `name`."""
        return Figure(name=name, rounds=tuple(self._values[value]), unit=unit, at_most=at_most, at_least=at_least)

    def ratio(
        self, value: str, base: str, name: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """How many times the value `base` the other one is, round by round."""
        pairs = zip(self._values[value], self._values[base], strict=True)
        return Figure(name=name, rounds=tuple(a / b for a, b in pairs), at_most=at_most, at_least=at_least)
