"""The bounded queue of waiting requests: what the policy chooses from.

Requests of a class wait in buckets of similar size (log-spaced, so a bucket's sizes differ by at most a twelfth), each
in order of arrival. Pushing and withdrawing a request are O(1); finding the oldest is O(number of buckets), a few dozen
however many requests wait. The queue has no clock, does no I/O and is not thread-safe: one event loop owns it.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Generic, TypeVar

from batching.errors import QueueFullError
from batching.request import Priority, Request

BUCKETS_PER_OCTAVE = 8
_STALE_DEADLINES_ALLOWED = 64

RequestT = TypeVar("RequestT", bound=Request)  # type: ignore[type-arg]  # a bound cannot be generic


def size_bucket(size: int) -> int:
    """The bucket of requests of this `size`: larger sizes have larger buckets; sizes up to 11 have one each."""
    return int(math.log2(size) * BUCKETS_PER_OCTAVE)


class RequestQueue(Generic[RequestT]):
    """Holds at most `max_items` requests until the policy takes them or their callers withdraw them."""

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        # All mutable state. A request waits exactly while it is a key of its bucket; an empty bucket does not exist.
        # `_deadlines` is a heap that may hold requests which no longer wait: they are skipped, and swept out before
        # they outnumber the others. Arrival numbers settle which of two requests came first.
        self._buckets: dict[Priority, dict[int, OrderedDict[RequestT, int]]] = {p: {} for p in Priority}
        self._counts = dict.fromkeys(Priority, 0)
        self._sizes = dict.fromkeys(Priority, 0)
        self._deadlines: list[tuple[float, int, RequestT]] = []
        self._arrival_numbers = count()

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __contains__(self, request: RequestT) -> bool:
        return request in self._buckets[request.priority].get(size_bucket(request.size), ())

    def waiting(self, priority: Priority) -> int:
        """How many requests of this class wait."""
        return self._counts[priority]

    def waiting_size(self, priority: Priority) -> int:
        """The sum of the sizes of the requests of this class that wait."""
        return self._sizes[priority]

    def ensure_room(self, added: int = 1) -> None:
        """Raise `QueueFullError` unless `added` more requests fit."""
        depth = len(self)
        if depth + added > self.max_items:
            raise QueueFullError(depth, self.max_items, added)

    def push(self, request: RequestT) -> None:
        """Add a request that does not wait yet; raises `QueueFullError` when there is no room."""
        self.ensure_room()
        number = next(self._arrival_numbers)
        self._buckets[request.priority].setdefault(size_bucket(request.size), OrderedDict())[request] = number
        self._counts[request.priority] += 1
        self._sizes[request.priority] += request.size
        if request.deadline_s < math.inf:
            heapq.heappush(self._deadlines, (request.deadline_s, number, request))

    def discard(self, request: RequestT) -> bool:
        """Remove a request, because its caller gave up or the policy took it; returns whether it was waiting."""
        buckets = self._buckets[request.priority]
        index = size_bucket(request.size)
        bucket = buckets.get(index)
        if bucket is None or bucket.pop(request, None) is None:
            return False
        if not bucket:
            del buckets[index]
        self._counts[request.priority] -= 1
        self._sizes[request.priority] -= request.size
        self._sweep_deadlines()
        return True

    def pop_expired(self, now: float) -> list[RequestT]:
        """Remove and return the requests whose deadline has come, earliest deadline first."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if self.discard(request):
                expired.append(request)
        return expired

    def oldest(self, priority: Priority) -> RequestT | None:
        """The request of this class that came first, or None when none waits."""
        heads = (next(iter(bucket.items())) for bucket in self._buckets[priority].values())
        return min(heads, key=lambda head: head[1], default=(None, 0))[0]

    def bucket_indices(self, priority: Priority) -> list[int]:
        """The buckets in which requests of this class wait, smallest sizes first."""
        return sorted(self._buckets[priority])

    def bucket(self, priority: Priority, index: int) -> Iterable[RequestT]:
        """The waiting requests of one bucket in order of arrival; must not be iterated across changes of the queue."""
        return self._buckets[priority].get(index, OrderedDict())

    def _sweep_deadlines(self) -> None:
        if len(self._deadlines) > 2 * len(self) + _STALE_DEADLINES_ALLOWED:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self]
            heapq.heapify(self._deadlines)
