"""What is measured of a server that answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from modalkit.benchmarks.load import Load, Measured, run_load
from modalkit.benchmarks.peers.process import Server
from modalkit.benchmarks.peers.servers.poison import POISON

LOADS = (0.3, 0.6, 0.8)
"""Shares of a server's own capacity at which latencies are measured."""
POISONED_BATCH = 32
POISON_ROUNDS = 3
SLOW_WARM_UP_S = 5.0
SLOW_S = 15.0


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that are sent, with the labels that float32 gives."""

    texts: Sequence[str]
    labels: Sequence[str]

    @property
    def items(self) -> list[dict[str, str]]:
        """As the items of requests."""
        return [{"text": text} for text in self.texts]


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of each part."""

    warm_up_s: float
    throughput_s: float
    open_loop_s: float
    idle_s: float
    is_quick: bool = False
    """Whether to try only the first settings of each sweep, and each load once: to see that all works."""


def closed_loop(server: Server, texts: Texts, clients: int, durations: Durations) -> dict[str, object]:
    """Throughput and latencies with so many clients, each of which waits for its answer.

    Where less than half of them got one in the time, which then tells nothing, it is measured for longer.
    """
    load = Load(clients=clients, seconds=durations.throughput_s, warm_up_s=durations.warm_up_s)
    found = run_load(server.endpoint, texts.items, load)
    if found.answered < clients / 2 and not durations.is_quick:
        found = run_load(server.endpoint, texts.items, replace(load, seconds=SLOW_S, warm_up_s=SLOW_WARM_UP_S))
    return _told(found)


def idle(server: Server, texts: Texts, durations: Durations) -> dict[str, object]:
    """Latencies of one client, and how many of its answers have the label that float32 gives."""
    load = Load(clients=1, seconds=durations.idle_s, warm_up_s=0.5)
    return _told(run_load(server.endpoint, texts.items, load, labels=texts.labels))


def open_loop(server: Server, texts: Texts, per_second: float, durations: Durations) -> dict[str, object]:
    """Latencies of requests that arrive at random, counted from when they were due."""
    load = Load(rate_per_s=per_second, arrivals="poisson", seconds=durations.open_loop_s, warm_up_s=1)
    return {"rate": per_second, **_told(run_load(server.endpoint, texts.items, load))}


def poisoned(server: Server, texts: Texts) -> dict[str, object]:
    """How many of 31 others fail with the one item that makes the model raise; the mean and the most of some rounds."""
    others = [item for item in texts.items if len(item["text"]) < 200][: POISONED_BATCH - 1]  # short
    middle = len(others) // 2
    items = [*others[:middle], {"text": POISON}, *others[middle:]]
    failed = []
    for _ in range(POISON_ROUNDS):
        found = run_load(server.endpoint, items, Load(clients=POISONED_BATCH, requests=len(items)))
        failed.append(len(others) - found.answered)
    return {"others": len(others), "failed": sum(failed) / len(failed), "failed_at_most": max(failed)}


def _told(found: Measured) -> dict[str, object]:
    return {
        "per_s": found.items_per_s,
        "p50_ms": found.p50_s * 1000 if found.answered else None,
        "p99_ms": found.p99_s * 1000 if found.answered else None,
        "answered": found.answered,
        "errors": dict(found.errors),
        "accuracy": found.accuracy if found.answered else None,
        "generator_was_the_limit": list(found.limited),
    }
