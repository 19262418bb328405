"""The bounded queue of waiting requests, from which the planner forms batches.

Each lane keeps its requests in buckets of similar size (log-spaced: sizes in a bucket differ by less than a twentieth),
each bucket in order of arrival. To push or to withdraw a request is O(1). To find the oldest is O(number of buckets),
which is a few dozen however many requests wait. The queue has no clock, does no I/O and is not thread-safe.

It also knows how many seconds the requests of each lane take, as a function of their sizes predicts: the sum changes
with each request, so that to ask for it is O(1) too.
"""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice
from operator import attrgetter
from typing import Generic, TypeVar

from modalkit.batching.errors import QueueFullError
from modalkit.batching.request import LARGEST_SIZE, Priority, Request

BUCKETS_PER_OCTAVE = 16
LARGEST_SMALL_SIZE = 2048
_STALE_LIMIT = 64

RequestT = TypeVar("RequestT", bound=Request)  # type: ignore[type-arg]  # a bound cannot be generic


def _bucket_of(size: int) -> int:
    return int(math.log2(size) * BUCKETS_PER_OCTAVE)


_BUCKETS_OF_SMALL_SIZES = [0, *map(_bucket_of, range(1, LARGEST_SMALL_SIZE + 1))]


def size_bucket(size: int) -> int:
    """The bucket of requests of this `size`. Larger sizes have larger buckets; sizes up to 27 have one each."""
    return _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)


def _size_of(bucket: int) -> int:
    """The smallest size in a bucket."""
    return math.ceil(2 ** (bucket / BUCKETS_PER_OCTAVE))


class _Lane(Generic[RequestT]):
    """The waiting requests of one priority.

    A request that is taken or withdrawn leaves its bucket later: when it is at the front, when a request is requeued
    there, or when such stale requests outnumber the waiting ones.
    """

    __slots__ = ("buckets", "count", "counts", "seconds", "stale")

    def __init__(self) -> None:
        self.buckets: dict[int, deque[RequestT]] = {}
        self.count = 0
        self.counts = [0] * (size_bucket(LARGEST_SIZE) + 1)  # the waiting requests of each bucket
        self.seconds = 0.0  # that the waiting requests are predicted to take
        self.stale = 0

    def sweep(self) -> None:
        """Remove stale requests if there are too many."""
        if self.stale > self.count + _STALE_LIMIT:
            for index in self.buckets:
                self.rebuild(index)
            self.stale = 0

    def rebuild(self, index: int, added: Iterable[RequestT] = ()) -> None:
        """Remove stale requests from a bucket, and add some, in order of arrival."""
        waiting = (request for request in self.buckets.get(index, ()) if request.sequence > 0)
        once = dict.fromkeys((*waiting, *added))  # a requeued request may not have left its bucket yet
        self.buckets[index] = deque(sorted(once, key=attrgetter("sequence")))


class RequestQueue(Generic[RequestT]):
    """Holds at most `max_items` requests until the planner takes them or their callers withdraw them.

    `predict_s` gives the seconds that a request of a size takes. It is called once for each bucket, and again after
    `refresh`.
    """

    def __init__(self, max_items: int, predict_s: Callable[[int], float] = lambda _: 0.0) -> None:
        self.max_items = max_items
        self._predict_s = predict_s
        # All mutable state. A request waits exactly while its sequence number is positive. Buckets and deadlines may
        # hold some that do not wait.
        self._lanes: dict[Priority, _Lane[RequestT]] = {priority: _Lane() for priority in Priority}
        self._length = 0
        self._seconds_of = [math.nan] * (size_bucket(LARGEST_SIZE) + 1)  # NaN where it was not asked yet
        self._deadlines: list[tuple[float, int, RequestT]] = []
        self._sequence = count(1)

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: RequestT) -> bool:
        return request.sequence > 0

    def waiting(self, priority: Priority) -> int:
        """How many requests wait in this lane."""
        return self._lanes[priority].count

    def seconds(self, priority: Priority) -> float:
        """How many seconds the requests that wait in this lane are predicted to take."""
        lane = self._lanes[priority]
        return lane.seconds if lane.count else 0.0

    def refresh(self) -> None:
        """Predict the seconds of all requests anew."""
        self._seconds_of = [math.nan] * len(self._seconds_of)
        for lane in self._lanes.values():
            lane.seconds = sum(lane.counts[index] * self._predict(index) for index in lane.buckets)

    def _predict(self, index: int) -> float:
        if math.isnan(self._seconds_of[index]):
            self._seconds_of[index] = self._predict_s(_size_of(index))
        return self._seconds_of[index]

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add new requests: all of them, or none and raise `QueueFullError`."""
        if self._length + len(requests) > self.max_items:
            raise QueueFullError(self._length, self.max_items, len(requests))
        for request in requests:
            lane, size = self._lanes[request.priority], request.size
            index = _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)
            try:
                lane.buckets[index].append(request)
            except KeyError:
                self._predict(index)
                lane.buckets[index] = deque((request,))
            request.sequence = next(self._sequence)
            lane.count += 1
            lane.counts[index] += 1
            lane.seconds += self._seconds_of[index]
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, request.sequence, request))
        self._length += len(requests)

    def discard(self, request: RequestT) -> bool:
        """Remove a request, if it waits; returns whether it did."""
        if request.sequence <= 0:
            return False
        self.take([request])
        return True

    def take(self, requests: list[RequestT]) -> None:
        """Remove requests, all of which wait."""
        for request in requests:
            lane, size = self._lanes[request.priority], request.size
            index = _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)
            request.sequence = -request.sequence
            lane.count -= 1
            lane.counts[index] -= 1
            lane.seconds -= self._seconds_of[index]
            lane.stale += 1
        self._length -= len(requests)
        for lane in self._lanes.values():
            lane.sweep()
        if len(self._deadlines) > 2 * self._length + _STALE_LIMIT:
            waiting = {id(entry[2]): entry for entry in self._deadlines if entry[2].sequence > 0}
            self._deadlines = list(waiting.values())  # a requeued request has several entries
            heapq.heapify(self._deadlines)

    def requeue(self, requests: Sequence[RequestT]) -> None:
        """Let requests wait again that were taken, with their old sequence numbers, even if the queue is full."""
        buckets = defaultdict[tuple[_Lane[RequestT], int], list[RequestT]](list)
        for request in requests:
            lane, index = self._lanes[request.priority], size_bucket(request.size)
            request.sequence = -request.sequence
            lane.count += 1
            lane.counts[index] += 1
            lane.seconds += self._predict(index)
            buckets[lane, index].append(request)
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, request.sequence, request))
        for (lane, index), added in buckets.items():
            lane.rebuild(index, added)
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
        """The request of this lane that arrived first, or None when none waits."""
        lane = self._lanes[priority]
        oldest, empty = None, []
        for index, bucket in lane.buckets.items():
            while bucket and bucket[0].sequence < 0:
                bucket.popleft()
                lane.stale -= 1
            if not bucket:
                empty.append(index)
            elif oldest is None or bucket[0].sequence < oldest.sequence:
                oldest = bucket[0]
        for index in empty:
            del lane.buckets[index]
        return oldest

    def bucket_indices(self, priority: Priority) -> list[int]:
        """The buckets of this lane that may hold waiting requests, smallest sizes first."""
        return sorted(self._lanes[priority].buckets)

    def front(self, priority: Priority, index: int, limit: int) -> list[RequestT]:
        """The oldest waiting requests of one bucket, at most `limit`, in order of arrival."""
        bucket = self._lanes[priority].buckets.get(index, ())
        return list(islice((request for request in bucket if request.sequence > 0), limit))

    def all_but(self, requests: list[RequestT]) -> list[RequestT]:
        """All waiting requests of the lane of these `requests` except these, smallest sizes first."""
        buckets = self._lanes[requests[0].priority].buckets
        excluded = set(map(id, requests))
        return [
            request
            for index in sorted(buckets)
            for request in buckets[index]
            if request.sequence > 0 and id(request) not in excluded
        ]
