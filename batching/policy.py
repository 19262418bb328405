"""The limits that every batch keeps, and the planner's decision about the next batch.

Two words of this package. The *anchor* of a batch is the request that the batch is formed around: the oldest one of its
lane. Its *companions* are the other requests of the batch, chosen by size.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic

from modalkit.batching.queue import RequestT
from modalkit.batching.request import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """The limits of the queue and of every batch. Times are in seconds; None sets no limit.

    Raises `ValueError` for a limit out of range.
    """

    max_batch_size: int = 32
    """Requests in a batch."""
    max_batch_tokens: int | None = None
    """Padded tokens of a batch: the number of requests times the largest size."""
    max_batch_s: float | None = None
    """Predicted time of a batch. A single request may exceed it, because it has to run at some time."""
    max_wait_s: float = 0.0
    """How long an idle worker may wait for a fuller batch, if the predicted costs say that waiting pays."""
    max_queue_items: int = 10_000
    """Requests that wait."""
    max_queue_s: float | None = 600.0
    """Predicted seconds of what waits before a new request, for callers that ask `BatchScheduler.check_room`."""
    max_age_s: float = 2.0
    """Age at which a request is overdue: no later one of its owner and lane then runs before it, except as a companion,
    and its batch waits for no more requests. Other owners keep their turns."""
    bulk_share: float = 0.1
    """The share of the running time that bulk requests get while interactive ones wait as well."""
    max_bulk_batch_s: float | None = None
    """Predicted time of a bulk batch while interactive requests arrive. Such batches are short in any case, as far as
    that costs at most 3 % of the bulk throughput."""
    mixes_lanes: bool = True
    """Whether interactive batches take bulk requests as companions where these add almost no time."""

    def __post_init__(self) -> None:
        self._require("max_batch_size", self.max_batch_size >= 1, "at least 1")
        self._require("max_batch_tokens", self.max_batch_tokens is None or self.max_batch_tokens >= 1, "at least 1")
        self._require("max_batch_s", self.max_batch_s is None or self.max_batch_s > 0, "positive")
        self._require("max_wait_s", 0 <= self.max_wait_s < math.inf, "a finite time, 0 or more")
        self._require("max_queue_items", self.max_queue_items >= 1, "at least 1")
        self._require("max_queue_s", self.max_queue_s is None or self.max_queue_s > 0, "positive")
        self._require("max_age_s", self.max_age_s >= 0, "0 or more")
        self._require("max_bulk_batch_s", self.max_bulk_batch_s is None or self.max_bulk_batch_s > 0, "positive")
        self._require("bulk_share", 0 <= self.bulk_share < 1, "from 0 to below 1")

    def _require(self, name: str, holds: bool, expectation: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expectation}, got {getattr(self, name)!r}")


class DispatchReason(StrEnum):
    """Why a batch was dispatched as it was."""

    FULL = "full"
    """It held as many requests as `max_batch_size` allows."""
    BUDGET = "budget"
    """One more request would have exceeded `max_batch_tokens`, `max_batch_s`, or the memory of the device."""
    AGE = "age"
    """Its oldest request was overdue, or had waited for `max_wait_s`."""
    DEADLINE = "deadline"
    """Waiting would have paid, but a request in it would have missed its deadline."""
    IDLE = "idle"
    """A worker was free, and neither one more companion nor waiting would have paid."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[RequestT]):
    """Requests that run together; the first is the anchor."""

    requests: list[RequestT]
    priority: Priority
    """The lane of the anchor. Interactive batches may hold bulk requests, too."""
    reason: DispatchReason
    longest: int
    """The size of the largest request."""
    total: int
    """The sum of the sizes."""
    predicted_s: float
    contended: bool = False
    """Whether requests of the other lane waited when it was formed."""
    baseline_s: float | None = None
    """For a trial (see `Exploration`): seconds that its requests would take in batches predicted to be best."""
    device: int = 0
    """The index of the device that it was formed for."""

    @property
    def padded_tokens(self) -> int:
        """The sum of the sizes after padding all requests to the largest."""
        return len(self.requests) * self.longest


@dataclass(frozen=True, slots=True)
class Decision(Generic[RequestT]):
    """What to do now: run `batch`; or ask again at `wake_s`, and when a request arrives.

    `expired` are requests whose deadline passed in the queue. They have left it and need an outcome.
    """

    batch: Batch[RequestT] | None = None
    wake_s: float = math.inf
    expired: list[RequestT] = field(default_factory=list)
