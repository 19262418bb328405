from collections.abc import Callable
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from modalkit.batching import MeasuredCostModel, Request
from modalkit.benchmarks.simulate.optimal import OptimalPartition
from modalkit.benchmarks.simulate.workload import IndexedRequest

MakeRequests = Callable[..., list[IndexedRequest]]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_its_batches_take_no_longer_than_those_of_any_other_cut_of_the_sorted_queue(sizes: list[int]) -> None:
    costs = MeasuredCostModel()
    rule = OptimalPartition(costs, max_batch_size=4)
    for number, size in enumerate(sizes):
        rule.push(Request(number, size))
    by_size = sorted(sizes)

    def seconds(cuts: tuple[int, ...]) -> float:
        bounds = (0, *cuts, len(sizes))
        parts = [by_size[first:last] for first, last in pairwise(bounds)]
        if any(len(part) > 4 for part in parts):
            return float("inf")
        return sum(costs.predict_s(len(part), part[-1], sum(part)) for part in parts)

    best_s = min(seconds(cuts) for count in range(len(sizes)) for cuts in combinations(range(1, len(sizes)), count))
    ours = rule._partition(sorted(rule.queue, key=lambda request: request.size))  # noqa: SLF001  # its claim
    assert seconds(tuple(sorted(first for first, _ in ours if first))) <= best_s * (1 + 1e-9)


def test_the_batch_with_the_oldest_request_runs_first_and_nobody_is_lost(make_requests: MakeRequests) -> None:
    rule = OptimalPartition(MeasuredCostModel(), max_batch_size=2)
    for request in make_requests(200, 10, 11, 198):
        rule.push(request)
    numbers = []
    while (batch := rule.decide(0.0).batch) is not None:
        numbers.append([request.payload for request in batch.requests])
    assert numbers == [[3, 0], [1, 2]]
