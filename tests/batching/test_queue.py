"""The queue keeps count, order and deadlines right through any sequence of changes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from modalkit.batching import Priority, QueueFullError, Request, RequestQueue
from modalkit.batching.queue import size_bucket

sizes = st.integers(1, 2000)
MAX_ITEMS = 20


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
    )
    def push(self, size: int, priority: Priority, lifetime_s: float) -> object:
        request = Request(None, size, priority, self.now, self.now + lifetime_s)
        if len(self.expected) == MAX_ITEMS:
            with pytest.raises(QueueFullError) as caught:
                self.queue.push_all([request])
            assert caught.value.depth == caught.value.limit == MAX_ITEMS
            return multiple()
        self.queue.push_all([request])
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
            assert self.queue.oldest(priority) is (waiting[0] if waiting else None)
            in_buckets = [r for i in self.queue.bucket_indices(priority) for r in self.queue.front(priority, i, 1000)]
            seconds = sum(r.size for r in waiting) / self.unit
            assert seconds / 1.05 - 1e-6 <= self.queue.seconds(priority) <= seconds + 1e-6
            assert in_buckets == sorted(waiting, key=lambda r: size_bucket(r.size))


TestQueueMachine = QueueMachine.TestCase


def test_cancelled_requests_with_deadlines_leave_no_memory_behind() -> None:
    queue: RequestQueue[Request[None]] = RequestQueue(10)
    for i in range(10_000):
        request = Request(None, deadline_s=float(i))
        queue.push_all([request])
        queue.discard(request)
    assert len(queue._deadlines) < 100  # noqa: SLF001  # no public view of what a leak would fill


def test_a_full_queue_says_how_deep_it_is_and_what_to_do() -> None:
    queue: RequestQueue[Request[None]] = RequestQueue(2)
    queue.push_all([Request(None)])
    with pytest.raises(QueueFullError, match=r"holds 1 of at most 2 requests and has no room for 2 more.*retry later"):
        queue.push_all([Request(None), Request(None)])
