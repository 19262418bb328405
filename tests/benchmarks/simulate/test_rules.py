from collections.abc import Callable

from modalkit.batching import Decision, Request
from modalkit.benchmarks.simulate.rules import FixedWindow, SortedFifo, TokenBudget
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
