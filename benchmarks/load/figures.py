"""The figures of a load, from what its processes measured."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modalkit.benchmarks.load.client import NO_SOCKET
from modalkit.benchmarks.load.plan import Load
from modalkit.benchmarks.load.worker_process import PartResult

BUSY_CPU_SHARE = 0.9
"""A process of a closed loop that uses more of its core may have been what limited the throughput."""
ITEM_FAILED = "an error in place of the result"
"""The reason of items that failed in a list that was answered."""
MAX_LATE_S = 0.005
MAX_LATE_SHARE = 0.1
"""Requests of an open loop may be late by 5 ms, or by a tenth of the latency, in 99 of 100 cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run measured. Of a closed loop, the requests that ended in its time; of an open one, those due in it."""

    items_per_s: float
    requests_per_s: float
    answered: int
    """Items."""
    errors: Mapping[str, int]
    """Items without a result, by the reason; all of a request that failed."""
    elapsed_s: float
    due_per_s: float
    """Requests that came due; those of a closed loop, that ended."""
    latencies_s: npt.NDArray[np.float64]
    """Of successful requests, in the order in which they ended; NaN in all figures where there is none."""
    ended: npt.NDArray[np.float64]
    """Of the successful requests that ended in the measured time, a row each for the seconds since its begin, the
    latencies and the items."""
    cpu_share: float
    """Of one core, that the busiest process of the generator used."""
    late_p99_s: float
    """How late 99 of 100 requests were sent at most."""
    processes: int
    limited: tuple[str, ...] = ()
    """Why the generator, and not the server, was the limit."""
    accuracy: float | None = None
    kept: Sequence[Any] = field(default=(), repr=False)
    """What the calls kept, see `PartResult`."""
    setup: Any = None
    """What the model runs by, where that is the process of the generator itself."""
    begin_s: float = 0.0
    """The begin of the measured time, by `time.perf_counter`."""
    was_steady: bool = False
    """Whether it ended because the throughput no longer changed."""

    def latency_s(self, share: float) -> float:
        """The latency that this share of the requests does not exceed."""
        return float(np.quantile(self.latencies_s, share)) if len(self.latencies_s) else float("nan")

    @property
    def p50_s(self) -> float:
        """The median latency."""
        return self.latency_s(0.5)

    @property
    def p99_s(self) -> float:
        """The latency that 99 of 100 requests do not exceed."""
        return self.latency_s(0.99)

    @property
    def mean_s(self) -> float:
        """The mean latency."""
        return float(self.latencies_s.mean()) if len(self.latencies_s) else float("nan")


def measured_of(results: Sequence[PartResult], load: Load, *, begin_s: float, end_s: float) -> Measured:
    """The figures of the requests within a time; of a fixed number of requests, of all of them."""
    times_s = np.concatenate([result.times_s for result in results], axis=1)
    answered = np.concatenate([result.answered for result in results])
    reasons = Counter[str]()
    due_s, sent_s, ended_s = times_s
    if load.requests is not None:
        end_s = float(ended_s.max()) if len(ended_s) else end_s
    is_counted = (begin_s <= ended_s) & (ended_s <= end_s)
    is_sample = (begin_s <= due_s) & (due_s <= end_s) if load.is_open else is_counted
    for result in results:
        part_due_s, _, part_ended_s = result.times_s
        at_s = part_due_s if load.is_open else part_ended_s
        is_here = (begin_s <= at_s) & (at_s <= end_s)
        if not load.is_open:  # what failed later was under way in that time
            is_here |= (result.answered < 0) & (part_due_s <= end_s) & (part_ended_s > end_s)
        for code, requests in zip(*np.unique(result.answered[is_here], return_counts=True), strict=True):
            missing = int(requests) * (result.list_length if code < 0 else result.list_length - int(code))
            if missing > 0:
                reasons[result.reasons[-1 - code] if code < 0 else ITEM_FAILED] += missing
    is_good = answered >= 0
    elapsed_s = max(end_s - begin_s, 1e-9)
    order = np.argsort(ended_s)
    latencies_s = (ended_s - due_s)[order][(is_sample & is_good)[order]]
    late_s = (sent_s - due_s)[is_sample]
    cpu_share = max(result.cpu_share for result in results)
    late_p99_s = float(np.quantile(late_s, 0.99)) if len(late_s) else 0.0
    items = int(answered[is_counted & is_good].sum())
    return Measured(
        items_per_s=items / elapsed_s,
        requests_per_s=int((is_counted & is_good).sum()) / elapsed_s,
        answered=items,
        errors=dict(reasons.most_common()),
        elapsed_s=elapsed_s,
        due_per_s=int(is_sample.sum()) / elapsed_s,
        latencies_s=latencies_s,
        ended=np.stack((ended_s - begin_s, ended_s - due_s, answered))[:, is_counted & is_good],
        cpu_share=cpu_share,
        late_p99_s=late_p99_s,
        processes=len(results),
        limited=(
            *_limits(load, cpu_share, late_p99_s, latencies_s),
            *(reason for reason in reasons if reason.startswith(NO_SOCKET)),
        ),
        kept=[entry for result in results for entry in result.kept],
        setup=results[0].setup,
        begin_s=begin_s,
    )


def _limits(load: Load, cpu_share: float, late_p99_s: float, latencies_s: npt.NDArray[np.float64]) -> Iterator[str]:
    # An open loop is busy while it waits for less than a timer's millisecond, too: there, lateness tells.
    if cpu_share > BUSY_CPU_SHARE and not load.is_open:
        yield f"a process of the load generator used {cpu_share:.0%} of a core"
    p99_s = float(np.quantile(latencies_s, 0.99)) if len(latencies_s) else 0.0
    if late_p99_s > max(MAX_LATE_S, MAX_LATE_SHARE * p99_s):
        yield f"requests were sent up to {late_p99_s * 1000:.0f} ms late"
