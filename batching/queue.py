"""The bounded queue of waiting requests: what the policy chooses from.

Requests of a class wait in buckets of similar size (log-spaced: in a bucket they differ by less than a twentieth), each
in order of arrival. Pushing and withdrawing a request are O(1); finding the oldest is O(number of buckets), a few dozen
however many requests wait. The queue has no clock, does no I/O and is not thread-safe: one event loop owns it.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from itertools import count, islice
from operator import attrgetter
from typing import Generic, TypeVar

from modalkit.batching.errors import QueueFullError
from modalkit.batching.request import Priority, Request

BUCKETS_PER_OCTAVE = 16
LARGEST_SMALL_SIZE = 2048
_STALE_ALLOWED = 64

RequestT = TypeVar("RequestT", bound=Request)  # type: ignore[type-arg]  # a bound cannot be generic


def _bucket_of(size: int) -> int:
    return int(math.log2(size) * BUCKETS_PER_OCTAVE)


_BUCKETS_OF_SMALL_SIZES = [0, *map(_bucket_of, range(1, LARGEST_SMALL_SIZE + 1))]


def size_bucket(size: int) -> int:
    """The bucket of requests of this `size`: larger sizes have larger buckets; sizes up to 27 have one each."""
    return _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)


class _Class(Generic[RequestT]):
    """The waiting requests of one class.

    A request that is taken or withdrawn is only marked as waiting no longer. It is dropped from its bucket when it
    comes to the front, or when those that do not wait outnumber those that do.
    """

    __slots__ = ("buckets", "count", "size", "stale")

    def __init__(self) -> None:
        self.buckets: dict[int, deque[RequestT]] = {}
        self.count = 0
        self.size = 0
        self.stale = 0

    def sweep(self) -> None:
        if self.stale > self.count + _STALE_ALLOWED:
            for index, bucket in list(self.buckets.items()):
                waiting = deque(request for request in bucket if request.place > 0)
                for request in bucket:
                    request.is_linked = request.place > 0
                if waiting:
                    self.buckets[index] = waiting
                else:
                    del self.buckets[index]
            self.stale = 0

    def insert(self, request: RequestT) -> None:
        """Put a request that was in a bucket there again: the oldest of it, as a rule."""
        bucket = self.buckets.setdefault(size_bucket(request.size), deque())
        request.is_linked = True
        index = 0
        while index < len(bucket) and abs(bucket[index].place) < request.place:
            index += 1
        bucket.insert(index, request)


class RequestQueue(Generic[RequestT]):
    """Holds at most `max_items` requests until the policy takes them or their callers withdraw them."""

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        # All mutable state. A request waits exactly while its place in the order of arrival is positive; buckets and
        # deadlines may hold some that do not wait.
        self._classes: dict[Priority, _Class[RequestT]] = {priority: _Class() for priority in Priority}
        self._length = 0
        self._deadlines: list[tuple[float, int, RequestT]] = []
        self._places = count(1)

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: RequestT) -> bool:
        return request.place > 0

    def waiting(self, priority: Priority) -> int:
        """How many requests of this class wait."""
        return self._classes[priority].count

    def waiting_size(self, priority: Priority) -> int:
        """The sum of the sizes of the requests of this class that wait."""
        return self._classes[priority].size

    def ensure_room(self, added: int = 1) -> None:
        """Raise `QueueFullError` unless `added` more requests fit."""
        if self._length + added > self.max_items:
            raise QueueFullError(self._length, self.max_items, added)

    def push(self, request: RequestT) -> None:
        """Add a request that does not wait yet; raises `QueueFullError` when there is no room."""
        self.push_all((request,))

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add requests that do not wait yet, all or, with `QueueFullError`, none of them."""
        self.ensure_room(len(requests))
        for request in requests:
            of_class, size = self._classes[request.priority], request.size
            index = _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)
            try:
                of_class.buckets[index].append(request)
            except KeyError:
                of_class.buckets[index] = deque((request,))
            request.place = next(self._places)
            of_class.count += 1
            of_class.size += size
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, request.place, request))
        self._length += len(requests)

    def discard(self, request: RequestT) -> bool:
        """Remove a request, because its caller gave up or the policy took it; returns whether it was waiting."""
        if request.place <= 0:
            return False
        request.place = -request.place
        of_class = self._classes[request.priority]
        of_class.count -= 1
        of_class.size -= request.size
        of_class.stale += 1
        self._length -= 1
        of_class.sweep()
        self._sweep_deadlines()
        return True

    def take(self, requests: list[RequestT]) -> None:
        """Remove requests, all of which wait: cheaper than to discard them one by one."""
        for request in requests:
            of_class = self._classes[request.priority]
            request.place = -request.place
            of_class.count -= 1
            of_class.size -= request.size
            of_class.stale += 1
        self._length -= len(requests)
        for of_class in self._classes.values():
            of_class.sweep()
        self._sweep_deadlines()

    def put_back(self, requests: Sequence[RequestT]) -> None:
        """Let requests that were taken wait again, in their old places; `max_items` does not apply to them."""
        for request in sorted(requests, key=attrgetter("place")):  # the newest first: each goes to the front
            of_class = self._classes[request.priority]
            request.place = -request.place
            of_class.count += 1
            of_class.size += request.size
            if request.is_linked:
                of_class.stale -= 1
            else:
                of_class.insert(request)
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, request.place, request))
        self._length += len(requests)

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
        of_class = self._classes[priority]
        oldest, empty = None, []
        for index, bucket in of_class.buckets.items():
            while bucket and bucket[0].place < 0:
                bucket.popleft().is_linked = False
                of_class.stale -= 1
            if not bucket:
                empty.append(index)
            elif oldest is None or bucket[0].place < oldest.place:
                oldest = bucket[0]
        for index in empty:
            del of_class.buckets[index]
        return oldest

    def bucket_indices(self, priority: Priority) -> list[int]:
        """The buckets in which requests of this class may wait, smallest sizes first."""
        return sorted(self._classes[priority].buckets)

    def front(self, priority: Priority, index: int, most: int) -> list[RequestT]:
        """Up to `most` waiting requests of one bucket, in order of arrival."""
        bucket = self._classes[priority].buckets.get(index, ())
        return list(islice((request for request in bucket if request.place > 0), most))

    def all_but(self, requests: list[RequestT]) -> list[RequestT]:
        """The waiting requests of the class of these `requests`, without them, smallest sizes first."""
        buckets = self._classes[requests[0].priority].buckets
        left_out = set(map(id, requests))
        return [
            request
            for index in sorted(buckets)
            for request in buckets[index]
            if request.place > 0 and id(request) not in left_out
        ]

    def _sweep_deadlines(self) -> None:
        if len(self._deadlines) > 2 * self._length + _STALE_ALLOWED:
            waiting = {id(entry[2]): entry for entry in self._deadlines if entry[2].place > 0}
            self._deadlines = list(waiting.values())  # what was put back has several entries
            heapq.heapify(self._deadlines)
