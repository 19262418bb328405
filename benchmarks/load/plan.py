"""What load is put on a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from modalkit.benchmarks.load.arrivals import Arrivals
from modalkit.service.errors import ServiceError, UsageError

T = TypeVar("T", int, float)


class BenchError(ServiceError):
    """Raised where a target cannot be measured."""


class OptionError(BenchError, UsageError):
    """Raised for an option that makes no sense, or not beside another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A closed loop of `clients`, or with `rate_per_s` or a trace an open loop.

    A client of a closed loop sends its next request when the last one is answered. An open loop sends requests when
    they are due, whatever became of earlier ones, and counts latencies from then.
    """

    clients: int = 64
    rate_per_s: float | None = None
    """Requests (not items) per second."""
    arrivals: str = Arrivals.POISSON
    """An open loop's pattern: ``poisson``, ``constant``, ``bursty`` or the path of a trace, see `arrival_times`."""
    seconds: float = 10.0
    """The measured time, after the warm-up. With `until_steady` the longest one."""
    warm_up_s: float = 2.0
    until_steady: bool = False
    """End as soon as the throughput no longer changes."""
    requests: int | None = None
    """Send so many requests and stop, in place of `seconds` and without a warm-up."""
    processes: int | None = None
    """None starts with one, and takes more while the generator is the limit and there are cores."""
    timeout_s: float = 30.0
    """After which a request counts as failed."""
    max_connections: int = 2000
    """Of an open loop, in each process; requests beyond them wait, which counts as latency."""
    seed: int = 1
    """Of the random times of an open loop."""

    def __post_init__(self) -> None:
        for name in ("seconds", "timeout_s", "clients", "max_connections", "processes", "requests", "rate_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"{name} must be above 0, not {value:g}")
        if not 0 <= self.warm_up_s < math.inf:
            raise OptionError(f"warm_up_s must be 0 or more, not {self.warm_up_s:g}")

    @property
    def is_open(self) -> bool:
        """Whether requests are sent at given times."""
        return self.rate_per_s is not None or self.arrivals not in list(Arrivals)

    def __str__(self) -> str:
        """As in tables: ``64 clients``, ``30/s poisson``."""
        if not self.is_open:
            return f"{self.clients} client{'s' if self.clients > 1 else ''}"
        if self.rate_per_s is None:
            return self.arrivals
        rate = f"{self.rate_per_s:.3g}" if self.rate_per_s < 1000 else f"{self.rate_per_s:.0f}"
        return f"{rate}/s {self.arrivals}"


def values_of(text: str, read: Callable[[str], T], option: str, example: str) -> list[T]:
    """The numbers of an option that has several, with commas, each once. Raises `OptionError`."""
    try:
        values = [read(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise OptionError(f"{option} {text!r}: give numbers above 0, as {example}")
    return list(dict.fromkeys(values))
