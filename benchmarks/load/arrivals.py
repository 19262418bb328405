"""When the requests of an open loop are due."""

import json
import random
from collections.abc import Iterator
from enum import StrEnum
from itertools import count
from pathlib import Path

BURST = 10
"""Requests that a burst has on average."""


class Arrivals(StrEnum):
    """The patterns that have a name."""

    POISSON = "poisson"
    CONSTANT = "constant"
    BURSTY = "bursty"


def arrival_times(
    pattern: str, rate_per_s: float | None, part: int = 0, parts: int = 1, seed: int = 1
) -> Iterator[float]:
    """The seconds from the begin at which requests are due; those of one of several processes.

    ``poisson``: independent ones. ``constant``: in equal distances. ``bursty``: bursts of 10 on average at once, at
    times of a Poisson process. These times are the same for the same `seed`. Else the path of a trace: a time in
    seconds on each line, alone or as ``timestamp`` of a JSON object, where the first one is the begin; with
    `rate_per_s` the trace is stretched to that mean rate. It ends.

    Raises ``OSError`` and ``ValueError`` for a trace that cannot be read.
    """
    if pattern not in list(Arrivals):
        times_s = read_trace(Path(pattern))
        if rate_per_s is not None and times_s[-1]:
            stretch = len(times_s) / rate_per_s / times_s[-1]
            times_s = [stretch * time_s for time_s in times_s]
        return iter(times_s[part::parts])
    if rate_per_s is None:
        raise ValueError(f"{pattern} arrivals need a rate")
    if pattern == Arrivals.CONSTANT:
        return ((part + parts * index) / rate_per_s for index in count())
    dice = random.Random(f"{seed} {part}")  # noqa: S311  # a repeatable load
    own_rate = rate_per_s / parts
    return _poisson(dice, own_rate) if pattern == Arrivals.POISSON else _bursty(dice, own_rate)


def _poisson(dice: random.Random, rate_per_s: float) -> Iterator[float]:
    time_s = 0.0
    while True:
        time_s += dice.expovariate(rate_per_s)
        yield time_s


def _bursty(dice: random.Random, rate_per_s: float) -> Iterator[float]:
    for time_s in _poisson(dice, rate_per_s / BURST):
        yield time_s
        while dice.random() > 1 / BURST:  # a geometric number of requests
            yield time_s


def read_trace(path: Path) -> list[float]:
    """The times of a trace, the first of them 0, in order. Raises ``OSError``, and ``ValueError`` with the line."""
    times_s = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            times_s.append(float(value["timestamp"] if isinstance(value, dict) else value))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r} is no time; give seconds, or an object with a timestamp"
            ) from None
    if not times_s:
        raise ValueError(f"{path} holds no times; give a time in seconds on each line")
    times_s.sort()
    return [time_s - times_s[0] for time_s in times_s]
