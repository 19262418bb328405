from collections.abc import Callable

import pytest

from modalkit.batching import Decision, Request
from modalkit.benchmarks.simulate.adaptive import BentoRule, ClipperRule
from modalkit.benchmarks.simulate.rules import FixedWindow, SortedFifo, TokenBudget, as_batch
from modalkit.benchmarks.simulate.workload import IndexedRequest

MakeRequests = Callable[..., list[IndexedRequest]]


def numbers(decision: Decision[IndexedRequest]) -> list[int]:
    assert decision.batch is not None
    return [request.payload for request in decision.batch.requests]


def test_a_fixed_window_closes_when_the_oldest_has_waited_for_it(make_requests: MakeRequests) -> None:
    rule = FixedWindow(max_batch_size=4, window_s=0.010)
    assert rule.decide(0.0).wake_s == float("inf")
    for request in make_requests(5, 5, 5):
        rule.push(request)
    decision = rule.decide(0.002)
    assert decision.batch is None
    assert decision.wake_s == 0.010
    assert numbers(rule.decide(0.010)) == [0, 1, 2]


def test_a_fixed_window_closes_early_when_the_batch_is_full(make_requests: MakeRequests) -> None:
    rule = FixedWindow(max_batch_size=4, window_s=0.010)
    for request in make_requests(5, 5, 5, 5, 5):
        rule.push(request)
    assert numbers(rule.decide(0.004)) == [0, 1, 2, 3]


def test_a_token_budget_counts_padding_and_never_passes_over_a_request(make_requests: MakeRequests) -> None:
    rule = TokenBudget(max_tokens=40, max_batch_size=4)
    for request in make_requests(10, 10, 20, 5, 100, 1, 1, 1, 1, 1):
        rule.push(request)
    assert numbers(rule.decide(0.0)) == [0, 1]  # three of 20 would be 60 tokens
    assert numbers(rule.decide(0.0)) == [2, 3]
    assert numbers(rule.decide(0.0)) == [4]  # alone over the budget, but it has to run
    assert numbers(rule.decide(0.0)) == [5, 6, 7, 8]
    assert numbers(rule.decide(0.0)) == [9]


def test_a_sorted_fifo_runs_what_it_sorted_before_it_looks_at_the_queue_again(make_requests: MakeRequests) -> None:
    rule = SortedFifo(max_batch_size=2, batches=2)
    requests = make_requests(9, 1, 8, 2, 3)
    for request in requests:
        rule.push(request)
    assert numbers(rule.decide(0.0)) == [1, 3]
    rule.push(Request(5, 1, arrival_s=0.005))
    assert numbers(rule.decide(0.0)) == [2, 0]
    assert numbers(rule.decide(0.0)) == [5, 4]
    assert rule.decide(0.0).batch is None


class TestBento:
    def trained(self, *, request_s: float, batch_s: float, waited_s: float = 0.0) -> BentoRule:
        """A rule that has seen batches of such costs, whose oldest requests had waited so long."""
        rule = BentoRule(max_batch_size=8, max_latency_s=1.0)
        now = 0.0
        for count in (1, 1, 1, 2, 3):
            for index in range(count):
                rule.push(Request(index, 1, arrival_s=now - waited_s))
            batch = rule.decide(now).batch
            assert batch is not None
            assert len(batch.requests) == count
            elapsed_s = request_s * count + batch_s
            rule.end_batch(batch, elapsed_s)
            now += elapsed_s
        return rule

    def test_costs_are_fitted_by_least_squares_to_the_batches_that_count(self) -> None:
        rule = self.trained(request_s=0.003, batch_s=0.010, waited_s=0.004)
        assert rule.request_s == pytest.approx(0.003)
        assert rule.batch_s == pytest.approx(0.010)
        assert rule.wait_s == pytest.approx(0.004)

    def test_it_waits_a_tick_while_that_costs_less_than_requests_usually_wait(self) -> None:
        rule = self.trained(request_s=0.003, batch_s=0.010, waited_s=0.020)
        rule.push(Request(0, 1, arrival_s=1.0))
        decision = rule.decide(1.0)  # 1 x (0 + 1 ms + 3 ms) is below 0.95 x 20 ms
        assert decision.batch is None
        assert decision.wake_s == pytest.approx(1.001)
        assert numbers(rule.decide(1.016)) == [0]  # 16 + 1 + 3 ms is not

    def test_the_newest_go_first(self) -> None:
        rule = self.trained(request_s=0.003, batch_s=0.010)
        for index in range(10):
            rule.push(Request(index, 1, arrival_s=2.0))
        assert numbers(rule.decide(2.0)) == [9, 8, 7, 6, 5, 4, 3, 2]
        assert numbers(rule.decide(2.0)) == [1, 0]

    def test_the_oldest_is_turned_away_when_it_would_be_answered_too_late(self) -> None:
        rule = self.trained(request_s=0.003, batch_s=0.010)
        for index, arrival_s in enumerate((2.0, 2.5, 2.9)):
            rule.push(Request(index, 1, arrival_s=arrival_s))
        decision = rule.decide(2.99)  # 0.99 s + 3 x 3 ms + 10 ms is over a second
        assert [request.payload for request in decision.expired] == [0]
        assert numbers(decision) == [2, 1]


def test_clippers_limit_grows_by_one_and_shrinks_by_a_tenth(make_requests: MakeRequests) -> None:
    rule = ClipperRule(objective_s=0.1, max_batch_size=12)
    requests = make_requests(*[1] * 100)
    for request in requests:
        rule.push(request)
    for expected in range(1, 11):
        batch = rule.decide(0.0).batch
        assert batch is not None
        assert len(batch.requests) == expected
        rule.end_batch(batch, 0.09)
    assert rule.limit == 11
    rule.end_batch(as_batch(requests[:11]), 0.11)
    assert rule.limit == pytest.approx(9.9)
    rule.end_batch(as_batch(requests[:3]), 0.01)  # was not full: says nothing of larger ones
    assert rule.limit == pytest.approx(9.9)
