"""What waits in the queue, and what becomes of it."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

LARGEST_SIZE = 2**31
"""No request counts as larger: what a pipeline says by mistake must not turn the sums of the policy into infinities."""

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class Priority(StrEnum):
    """The two classes of requests: somebody waits for an answer, or the work only has to be done."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(slots=True, eq=False)
class Request(Generic[T]):
    """One item on its way to a batch.

    `size` is in the pipeline's own unit (tokens, for text), at least 1 and at most `LARGEST_SIZE`. Times are seconds on
    the clock of whoever drives the queue; a request whose `deadline_s` has come is dropped instead of run.
    """

    payload: T
    size: int = 1
    priority: Priority = Priority.INTERACTIVE
    arrival_s: float = 0.0
    deadline_s: float = math.inf
    place: int = field(default=0, init=False)
    """Its place in the order of arrival, negative while it does not wait, 0 before it first does; set by the queue."""
    is_linked: bool = field(default=True, init=False)
    """Whether a bucket of the queue holds it, waiting or not, once it was pushed; set by the queue."""


@dataclass(
    slots=True
)  # not frozen, which would make one three times as slow to make, and there is one for each request
class Success(Generic[R_co]):
    """The outcome of a request that got its result."""

    value: R_co


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of a request that got an error."""

    error: Exception
    is_systemic: bool = False
    """Whether nothing in its batch succeeded, so that the error says little about this request: it may run later."""


Outcome = Success[R_co] | Failure
"""What becomes of one request of several: match it against `Success` and `Failure`."""
