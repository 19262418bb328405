"""Requests that wait in the queue, and their outcomes."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypedDict, TypeVar

LARGEST_SIZE = 2**31
"""The largest size of a request. A larger one, by a mistake of a pipeline, could make sums of sizes infinite."""

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class Priority(StrEnum):
    """The lane of the queue that a request waits in: its caller waits for the answer, or the work has time (jobs)."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class QueueOptions(TypedDict, total=False):
    """How a request waits: keyword arguments of every function that passes requests on to a `BatchScheduler`."""

    priority: Priority
    """Its lane; by default the interactive one for requests, and the bulk one for jobs."""
    owner: str
    """On whose behalf it runs: owners get equal shares of a lane."""


class RequestOptions(QueueOptions, total=False):
    """How a request waits for its result."""

    timeout_s: float | None
    """Seconds after which it fails with `DeadlineExceededError`; None, the default, is no limit."""


@dataclass(slots=True, eq=False)
class Request(Generic[T]):
    """One item that waits to run in a batch.

    `size` is in the pipeline's own unit (tokens, for text), from 1 to `LARGEST_SIZE`. Times are seconds on the clock
    whose `now` the planner is given. A request whose `deadline_s` has come is dropped instead of run.
    """

    payload: T
    size: int = 1
    priority: Priority = Priority.INTERACTIVE
    arrival_s: float = 0.0
    deadline_s: float = math.inf
    owner: str = ""
    """On whose behalf it runs: owners get equal shares of a lane."""
    sequence: int = field(default=0, init=False)
    """Its place in the order of its lane: positive while it waits, negative afterwards, 0 before. Set by the queue."""


@dataclass(slots=True)  # not frozen: one is made for each request, and a frozen one takes three times as long to make
class Success(Generic[R_co]):
    """The outcome of a request that got its result."""

    value: R_co


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of a request that got an error."""

    error: Exception
    is_systemic: bool = False
    """Whether nothing in its batch succeeded. Then the request may not be the cause, and may run again later."""


Outcome = Success[R_co] | Failure
"""The outcome of one request: match it against `Success` and `Failure`."""
