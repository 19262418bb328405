"""The bounded queue of waiting requests, from which the planner forms batches.

Each lane keeps its requests in buckets of similar size (log-spaced: sizes in a bucket differ by less than a twentieth),
for each owner apart, each bucket in the order of sequence numbers. To push or to withdraw a request is O(1). To find
the first is O(number of buckets), which is a few dozen for each owner however many requests wait. The queue has no
clock, does no I/O and is not thread-safe.

Sequence numbers share a lane between owners, as self-clocked fair queueing does: the number of a request is the last
one of its owner plus its size, and an owner of whom nothing waits starts at the number that the lane has reached, or
that of its last request that ran. So the requests of one owner are in order of arrival, and those of several take
turns, by size.

It also knows how many seconds the requests of each lane take, as a function of their sizes predicts: the sum changes
with each request, so that to ask for it is O(1) too.
"""

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Generic, TypeVar

from modalkit.batching.cost import SHORTEST_S
from modalkit.batching.errors import QueueFullError
from modalkit.batching.request import LARGEST_SIZE, Priority, Request

BUCKETS_PER_OCTAVE = 16
LARGEST_SMALL_SIZE = 2048
RESERVED_DIVISOR = 10
_STALE_LIMIT = 64
_NEVER = math.inf

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

    __slots__ = ("count", "counts", "owners", "reached", "seconds", "stale")

    def __init__(self) -> None:
        self.owners: dict[str, _Owner[RequestT]] = {}
        self.count = 0
        self.counts = [0] * (size_bucket(LARGEST_SIZE) + 1)  # the waiting requests of each bucket
        self.seconds = 0.0  # that the waiting requests are predicted to take
        self.stale = 0
        self.reached = 0
        """The sequence number of the request that was first when it was last asked for."""

    def owner(self, name: str) -> "_Owner[RequestT]":
        """The requests of this owner, whose next sequence number follows those that had their turn."""
        owner = self.owners.get(name)
        if owner is None:
            owner = self.owners[name] = _Owner()
        if owner.last < self.reached:
            owner.last = self.reached
        return owner

    def sweep(self) -> None:
        """Remove stale requests if there are too many."""
        if self.stale > self.count + _STALE_LIMIT:
            for owner in self.owners.values():
                for index in owner.buckets:
                    owner.rebuild(index)
            self.stale = 0


class _Owner(Generic[RequestT]):
    """The waiting requests of one owner in a lane."""

    __slots__ = ("buckets", "count", "last", "taken")

    def __init__(self) -> None:
        self.buckets: dict[int, deque[RequestT]] = {}
        self.count = 0
        self.last = 0
        """The last sequence number that was given; once nothing waits, the highest one that was taken."""
        self.taken = 0
        """The highest sequence number that was taken to run."""

    def rebuild(self, index: int, added: Iterable[RequestT] = ()) -> None:
        """Remove stale requests from a bucket, and add some, in their order."""
        waiting = (request for request in self.buckets.get(index, ()) if request.sequence > 0)
        once = dict.fromkeys((*waiting, *added))  # a requeued request may not have left its bucket yet
        self.buckets[index] = deque(sorted(once, key=attrgetter("sequence")))


class RequestQueue(Generic[RequestT]):
    """Holds at most `max_items` requests until the planner takes them or their callers withdraw them.

    An owner with a name may fill nine tenths of it; the last tenth is for owners who hold no more than a tenth.

    `predict_s` gives the seconds that a request of a size takes. It is called once for each bucket, and again after
    `refresh`.
    """

    def __init__(self, max_items: int, predict_s: Callable[[int], float] = lambda _: 0.0) -> None:
        self.set_max_items(max_items)
        self._predict_s = predict_s
        # All mutable state. A request waits exactly while its sequence number is positive. Buckets and deadlines may
        # hold some that do not wait.
        self._lanes: dict[Priority, _Lane[RequestT]] = {priority: _Lane() for priority in Priority}
        self._length = 0
        self._seconds_of = [math.nan] * (size_bucket(LARGEST_SIZE) + 1)  # NaN where it was not asked yet
        self._deadlines: list[tuple[float, int, RequestT]] = []

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: RequestT) -> bool:
        return request.sequence > 0

    def set_max_items(self, max_items: int) -> None:
        """Hold at most `max_items` requests from now on; those that wait stay."""
        self.max_items = max_items
        self._reserved = max_items // RESERVED_DIVISOR
        self._unreserved = max_items - self._reserved

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
            indices = {index for owner in lane.owners.values() for index in owner.buckets}
            lane.seconds = sum(lane.counts[index] * self._predict(index) for index in indices)

    def seconds_per_size(self, size: int) -> float:
        """The seconds that a request of about this size is predicted to take, for each unit of its size."""
        index = size_bucket(size)
        return max(self._predict(index), SHORTEST_S) / _size_of(index)

    def _predict(self, index: int) -> float:
        if math.isnan(self._seconds_of[index]):
            self._seconds_of[index] = self._predict_s(_size_of(index))
        return self._seconds_of[index]

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add new requests of one priority and owner: all of them, or none and raise `QueueFullError`."""
        if not requests:
            return
        first = requests[0]
        lane, name = self._lanes[first.priority], first.owner
        if self._length + len(requests) > self._unreserved:
            self.check_room(name, len(requests))
        owner = lane.owners.get(name)
        if owner is None or owner.last < lane.reached:  # seldom, and a call takes longer than the look-up
            owner = lane.owner(name)
        buckets, last = owner.buckets, owner.last
        counts, seconds, seconds_of = lane.counts, lane.seconds, self._seconds_of
        for request in requests:
            size = request.size
            index = _BUCKETS_OF_SMALL_SIZES[size] if size <= LARGEST_SMALL_SIZE else _bucket_of(size)
            try:
                buckets[index].append(request)
            except KeyError:
                self._predict(index)
                buckets[index] = deque((request,))
            last += size
            request.sequence = last
            counts[index] += 1
            seconds += seconds_of[index]
            if request.deadline_s < _NEVER:
                heapq.heappush(self._deadlines, (request.deadline_s, id(request), request))
        owner.last = last
        owner.count += len(requests)
        lane.seconds = seconds
        lane.count += len(requests)
        self._length += len(requests)

    def check_room(self, name: str, added: int) -> None:
        """Raise `QueueFullError` if the owner `name` cannot add that many requests."""
        if self._length + added > self._unreserved and self._length + added > (limit := self._limit_of(name, added)):
            raise QueueFullError(self._length, limit, added)

    def _limit_of(self, name: str, added: int) -> int:
        """Requests that the queue may hold after an owner has added some."""
        if not name:
            return self.max_items
        held = sum(lane.owners[name].count for lane in self._lanes.values() if name in lane.owners)
        return self.max_items if held + added <= self._reserved else self._unreserved

    def discard(self, request: RequestT) -> bool:
        """Remove a request, if it waits; returns whether it did."""
        if request.sequence <= 0:
            return False
        self._remove([request], to_run=False)
        return True

    def take(self, requests: list[RequestT]) -> None:
        """Remove requests, all of which wait, to run them."""
        self._remove(requests, to_run=True)

    def _remove(self, requests: list[RequestT], *, to_run: bool) -> None:
        for priority, lane in self._lanes.items():
            if not lane.count:
                continue
            taken = [request for request in requests if request.priority is priority]
            owners = lane.owners
            for request in taken:
                sequence, owner = request.sequence, owners[request.owner]
                request.sequence = -sequence
                owner.count -= 1
                if to_run and sequence > owner.taken:
                    owner.taken = sequence
                if not owner.count:
                    owner.last = owner.taken
            # By size, because most of a batch have few different ones.
            for size, count in Counter([request.size for request in taken]).items():
                index = size_bucket(size)
                lane.counts[index] -= count
                lane.seconds -= count * self._seconds_of[index]
            lane.count -= len(taken)
            lane.stale += len(taken)
            lane.sweep()
        self._length -= len(requests)
        if not self._length:
            self._deadlines.clear()  # else it would hold requests that have ended until the next ones come
        elif len(self._deadlines) > 2 * self._length + _STALE_LIMIT:
            waiting = {id(entry[2]): entry for entry in self._deadlines if entry[2].sequence > 0}
            self._deadlines = list(waiting.values())  # a requeued request has several entries
            heapq.heapify(self._deadlines)

    def requeue(self, requests: Sequence[RequestT]) -> None:
        """Let requests wait again that were taken, with their old sequence numbers, even if the queue is full."""
        buckets = defaultdict[tuple[_Owner[RequestT], int], list[RequestT]](list)
        for request in requests:
            lane, index = self._lanes[request.priority], size_bucket(request.size)
            request.sequence = -request.sequence
            lane.count += 1
            lane.counts[index] += 1
            lane.seconds += self._predict(index)
            owner = lane.owner(request.owner)
            owner.count += 1
            buckets[owner, index].append(request)
            if request.deadline_s < math.inf:
                heapq.heappush(self._deadlines, (request.deadline_s, id(request), request))
        for (owner, index), added in buckets.items():
            owner.rebuild(index, added)
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
        """The request of this lane with the lowest sequence number, or None when none waits.

        Of one owner it is the one that arrived first, and of several the one of the owner whose turn it is.
        """
        lane = self._lanes[priority]
        oldest, gone, stale = None, [], 0
        for name, owner in lane.owners.items():
            empty = []
            for index, bucket in owner.buckets.items():
                while bucket and bucket[0].sequence < 0:
                    bucket.popleft()
                    stale += 1
                if not bucket:
                    empty.append(index)
                elif oldest is None or bucket[0].sequence < oldest.sequence:
                    oldest = bucket[0]
            for index in empty:
                del owner.buckets[index]
            if name and not owner.buckets and owner.last <= lane.reached:
                gone.append(name)  # a new one would start at the same number
        for name in gone:
            del lane.owners[name]
        lane.stale -= stale
        if oldest is not None:
            lane.reached = oldest.sequence
        return oldest

    def firsts(self, priority: Priority) -> list[RequestT]:
        """The first waiting request of each owner and bucket of this lane; one of them arrived before all others."""
        buckets = [bucket for owner in self._lanes[priority].owners.values() for bucket in owner.buckets.values()]
        first = [next((request for request in bucket if request.sequence > 0), None) for bucket in buckets]
        return [request for request in first if request is not None]

    def bucket_indices(self, priority: Priority) -> list[int]:
        """The buckets of this lane that may hold waiting requests, smallest sizes first."""
        return sorted({index for owner in self._lanes[priority].owners.values() for index in owner.buckets})

    def front(self, priority: Priority, index: int, limit: int) -> list[RequestT]:
        """The first waiting requests of one bucket, at most `limit`, in the order of their sequence numbers."""
        buckets = (owner.buckets.get(index, ()) for owner in self._lanes[priority].owners.values())
        waiting = [(request for request in bucket if request.sequence > 0) for bucket in buckets if bucket]
        in_order = waiting[0] if len(waiting) == 1 else heapq.merge(*waiting, key=attrgetter("sequence"))
        return list(islice(in_order, limit))

    def all_but(self, requests: list[RequestT]) -> list[RequestT]:
        """All waiting requests of the lane of these `requests` except these, smallest sizes first."""
        priority = requests[0].priority
        excluded = set(map(id, requests))
        return [
            request
            for index in self.bucket_indices(priority)
            for owner in self._lanes[priority].owners.values()
            for request in owner.buckets.get(index, ())
            if request.sequence > 0 and id(request) not in excluded
        ]
