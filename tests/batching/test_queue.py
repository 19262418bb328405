"""The queue keeps count, order and deadlines right through any sequence of changes."""

import math
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from modalkit.batching import Priority, QueueFullError, Request, RequestQueue
from modalkit.batching.queue import size_bucket

sizes = st.integers(1, 2000)
MAX_ITEMS = 20
RESERVED = MAX_ITEMS // 10


@given(sizes, sizes)
def test_a_bucket_holds_similar_sizes_only(a: int, b: int) -> None:
    if size_bucket(a) == size_bucket(b):
        assert max(a, b) <= min(a, b) * 2 ** (1 / 16)
    elif a < b:
        assert size_bucket(a) < size_bucket(b)


class QueueMachine(RuleBasedStateMachine):
    """Compares the queue with a plain list of what should be in it."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue: RequestQueue[Request[None]] = RequestQueue(MAX_ITEMS, lambda size: size / self.unit)
        self.unit = 1.0
        self.expected: list[Request[None]] = []
        self.now = 0.0

    @rule(
        target=requests,
        size=sizes,
        priority=st.sampled_from(Priority),
        lifetime_s=st.one_of(st.just(math.inf), st.floats(0, 10)),
        owner=st.sampled_from(["", "a", "b"]),
    )
    def push(self, size: int, priority: Priority, lifetime_s: float, owner: str) -> object:
        request = Request(None, size, priority, self.now, self.now + lifetime_s, owner)
        refusal = None
        try:
            self.queue.push_all([request])
        except QueueFullError as error:
            refusal = error
        if refusal is not None:
            assert refusal.depth == len(self.expected) >= refusal.limit
            assert refusal.limit in ((MAX_ITEMS, MAX_ITEMS - RESERVED) if owner else (MAX_ITEMS,))
            return multiple()
        assert len(self.expected) < MAX_ITEMS
        self.expected.append(request)
        return request

    @rule(request=consumes(requests))
    def discard(self, request: Request[None]) -> None:
        assert self.queue.discard(request) == (request in self.expected)
        assert not self.queue.discard(request)
        if request in self.expected:
            self.expected.remove(request)

    @rule(data=st.data(), back=st.booleans())
    def take(self, data: st.DataObject, *, back: bool) -> None:
        if not self.expected:
            return
        taken = data.draw(st.lists(st.sampled_from(self.expected), unique=True, min_size=1))
        self.queue.take(taken)
        if back:
            churned = data.draw(st.lists(st.sampled_from(self.expected), unique=True))
            for request in churned:  # what is withdrawn meanwhile may have swept the buckets
                if request not in taken:
                    assert self.queue.discard(request)
                    self.expected.remove(request)
            for priority in Priority:
                self.queue.oldest(priority)
            self.queue.requeue(taken)
        else:
            self.expected = [request for request in self.expected if request not in taken]

    @rule(unit=st.sampled_from((1.0, 1000.0)))
    def learn(self, unit: float) -> None:
        self.unit = unit
        self.queue.refresh()

    @rule(elapsed_s=st.floats(0, 5))
    def expire(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        expired = self.queue.pop_expired(self.now)
        assert set(expired) == {r for r in self.expected if r.deadline_s <= self.now}
        self.expected = [r for r in self.expected if r.deadline_s > self.now]

    @invariant()
    def counts_and_order_are_right(self) -> None:
        assert len(self.queue) == len(self.expected)
        for priority in Priority:
            waiting = [r for r in self.expected if r.priority is priority]
            assert self.queue.waiting(priority) == len(waiting)
            firsts = {owner: next(r for r in waiting if r.owner == owner) for owner in {r.owner for r in waiting}}
            oldest = self.queue.oldest(priority)
            assert (oldest is None) == (not waiting)
            assert oldest is None or firsts[oldest.owner] is oldest
            arrivals_s = [request.arrival_s for request in self.queue.firsts(priority)]
            assert min(arrivals_s, default=None) == min((r.arrival_s for r in waiting), default=None)
            assert oldest is None or oldest.sequence == min(r.sequence for r in waiting)
            in_buckets = [r for i in self.queue.bucket_indices(priority) for r in self.queue.front(priority, i, 1000)]
            seconds = sum(r.size for r in waiting) / self.unit
            assert seconds / 1.05 - 1e-6 <= self.queue.seconds(priority) <= seconds + 1e-6
            assert set(in_buckets) == set(waiting)
            places = [(size_bucket(r.size), r.sequence) for r in in_buckets]
            assert places == sorted(places)


TestQueueMachine = QueueMachine.TestCase


def test_cancelled_requests_with_deadlines_leave_no_memory_behind() -> None:
    queue: RequestQueue[Request[None]] = RequestQueue(10)
    for i in range(10_000):
        request = Request(None, deadline_s=float(i))
        queue.push_all([request])
        queue.discard(request)
    assert len(queue._deadlines) < 100  # noqa: SLF001  # no public view of what a leak would fill


class Image:
    """A payload that may be large."""


def test_an_empty_queue_holds_no_request_that_has_ended() -> None:
    """Its payload and its result may be large, and the next request may come late."""
    queue: RequestQueue[Request[Image]] = RequestQueue(10)
    requests = [Request(Image(), deadline_s=60.0) for _ in range(10)]
    images = weakref.WeakSet(request.payload for request in requests)
    queue.push_all(requests)
    queue.take(requests)
    requests.clear()
    assert queue.oldest(Priority.INTERACTIVE) is None
    assert not images


def test_a_full_queue_says_how_deep_it_is_and_what_to_do() -> None:
    queue: RequestQueue[Request[None]] = RequestQueue(2)
    queue.push_all([Request(None)])
    with pytest.raises(QueueFullError, match=r"holds 1 of at most 2 requests and has no room for 2 more.*retry later"):
        queue.push_all([Request(None), Request(None)])


def drained(queue: RequestQueue[Request[str]]) -> list[str]:
    """The payloads in the order in which they are first."""
    payloads = []
    while (oldest := queue.oldest(Priority.INTERACTIVE)) is not None:
        queue.take([oldest])
        payloads.append(oldest.payload)
    return payloads


def requests_of(owner: str, count: int, size: int = 1) -> list[Request[str]]:
    return [Request(owner, size, owner=owner) for _ in range(count)]


def test_a_single_request_does_not_wait_for_the_thousands_of_another_owner() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(20_000)
    queue.push_all(requests_of("a", 10_000, size=5))
    for _ in range(3):
        first = queue.oldest(Priority.INTERACTIVE)
        assert first is not None
        queue.take([first])
    queue.push_all(requests_of("b", 1, size=5))
    assert "b" in drained(queue)[:2]


def test_owners_get_equal_shares_by_the_sizes_of_their_requests() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(1000)
    queue.push_all(requests_of("a", 300, size=1))
    queue.push_all(requests_of("b", 300, size=3))
    queue.push_all(requests_of("c", 300, size=1))
    first = drained(queue)[:210]
    assert [first.count(owner) for owner in "abc"] == [90, 30, 90]


def test_an_owner_who_was_away_has_no_claim_to_the_time_that_others_used() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(1000)
    queue.push_all(requests_of("a", 300))
    for _ in range(200):
        queue.take([first for first in [queue.oldest(Priority.INTERACTIVE)] if first is not None])
    queue.push_all(requests_of("b", 100))
    first = drained(queue)[:20]
    assert first.count("b") in (10, 11)


@pytest.mark.parametrize("taken", [0, 50])
def test_withdrawn_requests_cost_their_owner_nothing(taken: int) -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(1000)
    withdrawn = requests_of("a", 300)
    queue.push_all(withdrawn)
    for _ in range(taken):
        queue.take([first for first in [queue.oldest(Priority.INTERACTIVE)] if first is not None])
    for request in withdrawn:
        queue.discard(request)
    queue.push_all(requests_of("b", 300))
    queue.push_all(requests_of("a", 1))
    assert "a" in drained(queue)[:2]


def test_withdrawn_requests_take_no_room_of_the_last_tenth() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(100)
    withdrawn = requests_of("a", 30)
    queue.push_all(withdrawn)
    for request in withdrawn:
        queue.discard(request)
    queue.push_all(requests_of("b", 90))
    queue.push_all(requests_of("a", 10))


def test_no_owner_fills_the_last_tenth_of_the_queue_for_the_others() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(100)
    queue.push_all(requests_of("a", 90))
    with pytest.raises(QueueFullError, match="90 of at most 90"):
        queue.push_all(requests_of("a", 1))
    queue.push_all(requests_of("b", 5))
    queue.push_all(requests_of("c", 5))
    with pytest.raises(QueueFullError, match="100 of at most 100"):
        queue.push_all(requests_of("d", 1))
    with pytest.raises(QueueFullError) as refused:
        RequestQueue[Request[str]](100).push_all(requests_of("a", 95))
    assert refused.value.is_permanent


def test_owners_who_are_gone_leave_no_memory_behind() -> None:
    queue: RequestQueue[Request[str]] = RequestQueue(10)
    for i in range(1000):
        queue.push_all(requests_of(str(i), 1))
        drained(queue)
    assert len(queue._lanes[Priority.INTERACTIVE].owners) < 3  # noqa: SLF001  # no public view of what a leak would fill
