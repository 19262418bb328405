"""The limits that every batch keeps, and what a decision about the next one looks like."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic

from modalkit.batching.queue import RequestT
from modalkit.batching.request import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """The limits that every batch and the queue keep. Times are in seconds.

    `max_batch_tokens` counts a batch as it is padded: the number of requests times the largest size. `max_batch_s` is
    the predicted time of a batch; a single request may exceed it, because it has to run some time. `max_wait_s` is how
    long an idle worker may hold a request back, where the measured costs say that the requests expected meanwhile make
    up for it. A request older than `max_age_s` is overdue: no later one of its class runs before it except in its own
    batch. `bulk_share` is the part of the running time that bulk requests get while interactive ones wait as well.
    While interactive requests arrive, bulk batches are as short as costs 3 % of their throughput at most, and no longer
    than `max_bulk_batch_s` where that is given. Interactive batches take bulk requests along that are nearly free, if
    it `mixes_classes`.

    Raises `ValueError` for a limit out of range.
    """

    max_batch_size: int = 32
    max_batch_tokens: int | None = None
    max_batch_s: float | None = None
    max_wait_s: float = 0.0
    max_queue_items: int = 10_000
    max_age_s: float = 2.0
    bulk_share: float = 0.1
    max_bulk_batch_s: float | None = None
    mixes_classes: bool = True

    def __post_init__(self) -> None:
        self._require("max_batch_size", self.max_batch_size >= 1, "at least 1")
        self._require("max_batch_tokens", self.max_batch_tokens is None or self.max_batch_tokens >= 1, "at least 1")
        self._require("max_batch_s", self.max_batch_s is None or self.max_batch_s > 0, "positive")
        self._require("max_wait_s", 0 <= self.max_wait_s < math.inf, "a finite time, 0 or more")
        self._require("max_queue_items", self.max_queue_items >= 1, "at least 1")
        self._require("max_age_s", self.max_age_s >= 0, "0 or more")
        self._require("max_bulk_batch_s", self.max_bulk_batch_s is None or self.max_bulk_batch_s > 0, "positive")
        self._require("bulk_share", 0 <= self.bulk_share < 1, "from 0 to below 1")

    def _require(self, name: str, holds: bool, expectation: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expectation}, got {getattr(self, name)!r}")


class DispatchReason(StrEnum):
    """Why a batch was sent off as it was."""

    FULL = "full"
    """It held as many requests as `max_batch_size` allows."""
    BUDGET = "budget"
    """One more request would have exceeded `max_batch_tokens`, `max_batch_s`, or what the device has room for."""
    AGE = "age"
    """Its oldest request was overdue, or had been held back for `max_wait_s`."""
    DEADLINE = "deadline"
    """It could have been held back, but a request in it would not have met its deadline."""
    IDLE = "idle"
    """A worker was free, and neither another waiting request nor waiting for one would have paid."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[RequestT]):
    """Requests that run together; the first is the one that it was formed around."""

    requests: list[RequestT]
    priority: Priority
    """The class of the first request; interactive batches may hold bulk requests, too."""
    reason: DispatchReason
    longest: int
    """The size of the largest request."""
    total: int
    """The sum of the sizes."""
    predicted_s: float
    contended: bool = False
    """Whether requests of the other class waited when it was formed."""
    otherwise_s: float | None = None
    """Of a try of a larger batch than costs speak for: what its requests were predicted to take without it."""

    @property
    def padded_tokens(self) -> int:
        """The sizes after padding all requests to the largest."""
        return len(self.requests) * self.longest


@dataclass(frozen=True, slots=True)
class Decision(Generic[RequestT]):
    """What to do now: run `batch`, or ask again at `wake_s` (or when something arrives).

    `expired` are requests whose deadline passed in the queue; they have left it and must be told so.
    """

    batch: Batch[RequestT] | None = None
    wake_s: float = math.inf
    expired: list[RequestT] = field(default_factory=list)
