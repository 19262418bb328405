"""The promises of the planner, whatever arrives, expires or is cancelled, in virtual time."""

import math
import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from modalkit.batching import (
    Batch,
    BatchPlanner,
    BatchPolicy,
    Decision,
    DispatchReason,
    PaddedCostModel,
    Priority,
    Request,
)
from modalkit.batching.queue import size_bucket

COSTS = PaddedCostModel(fixed_s=0.002, token_s=0.00005)
INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK


def planner(**limits: float | None) -> BatchPlanner[Request[int]]:
    return BatchPlanner(BatchPolicy(**limits), COSTS)  # type: ignore[arg-type]  # tests name the limits they set


def push(to: BatchPlanner[Request[int]], *sizes: int, priority: Priority = INTERACTIVE, at: float = 0.0) -> None:
    for size in sizes:
        to.push(Request(size, size, priority, at))


def sizes_of(decision: Decision[Request[int]]) -> list[int]:
    assert decision.batch is not None
    return [request.size for request in decision.batch.requests]


class PlannerMachine(RuleBasedStateMachine):
    """Checks every decision against the limits, the order of arrival and the book of all requests."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.policy = BatchPolicy(
            max_batch_size=5, max_batch_tokens=400, max_batch_s=0.02, max_wait_s=0.5, max_age_s=2.0, max_queue_items=50
        )
        self.planner: BatchPlanner[Request[None]] = BatchPlanner(self.policy, COSTS)
        self.waiting: list[Request[None]] = []
        self.running: list[Batch[Request[None]]] = []
        self.now = 0.0

    @precondition(lambda self: len(self.waiting) < 50)
    @rule(
        target=requests,
        size=st.integers(1, 400),
        priority=st.sampled_from(Priority),
        lifetime_s=st.one_of(st.just(math.inf), st.floats(0.01, 5)),
    )
    def arrive(self, size: int, priority: Priority, lifetime_s: float) -> Request[None]:
        request = Request(None, size, priority, self.now, self.now + lifetime_s)
        self.planner.push(request)
        self.waiting.append(request)
        return request

    @rule(request=consumes(requests))
    def cancel(self, request: Request[None]) -> None:
        if self.planner.queue.discard(request):
            self.waiting.remove(request)

    @rule(elapsed_s=st.floats(0, 3))
    def time_passes(self, elapsed_s: float) -> None:
        self.now += elapsed_s

    @rule(draining=st.booleans())
    def decide(self, draining: bool) -> None:
        decision = self.planner.decide(self.now, draining=draining)
        for request in decision.expired:
            assert request.deadline_s <= self.now
            self.waiting.remove(request)
        assert all(request.deadline_s > self.now for request in self.waiting)
        if decision.batch is None:
            assert self.waiting == [] or not draining
            assert all(self.now < r.arrival_s + self.policy.max_wait_s for r in self.waiting)
            assert decision.wake_s > self.now
            return
        self.check(decision.batch)
        for request in decision.batch.requests:
            self.waiting.remove(request)
        self.running.append(decision.batch)

    def check(self, batch: Batch[Request[None]]) -> None:
        of_its_lane = [request for request in self.waiting if request.priority is batch.priority]
        assert all(request in self.waiting for request in batch.requests)
        assert batch.priority is INTERACTIVE or all(request in of_its_lane for request in batch.requests)
        assert batch.requests[0] is of_its_lane[0], "the oldest request of the lane is the anchor of its batch"
        count, longest = len(batch.requests), max(request.size for request in batch.requests)
        assert count <= 5
        assert count * longest <= 400
        assert count == 1 or COSTS.predict_s(count, longest, 0) <= 0.02

    @precondition(lambda self: self.running)
    @rule(elapsed_s=st.floats(0, 1))
    def finish(self, elapsed_s: float) -> None:
        self.planner.end_batch(self.running.pop(), elapsed_s)

    @invariant()
    def nothing_is_lost_or_invented(self) -> None:
        assert len(self.planner.queue) == len(self.waiting)
        assert all(request in self.planner.queue for request in self.waiting)


TestPlannerMachine = PlannerMachine.TestCase


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.3]), st.floats(0.1, 10))
def test_bulk_gets_its_share_and_no_more_however_busy_interactive_is(
    seed: int, share: float, bulk_batch_costs: float
) -> None:
    """Both classes always wait; batches take random times."""
    chance = random.Random(seed)
    plan = planner(max_batch_size=1, bulk_share=share)
    spent_s = {INTERACTIVE: 0.0, BULK: 0.0}
    longest_s = 0.0
    for _ in range(300):
        push(plan, 1, priority=INTERACTIVE)
        push(plan, 1, priority=BULK)
        batch = plan.decide(0.0).batch
        assert batch is not None
        elapsed_s = chance.uniform(0.5, 1.5) * (bulk_batch_costs if batch.priority is BULK else 1.0)
        longest_s = max(longest_s, elapsed_s)
        spent_s[batch.priority] += elapsed_s
        plan.end_batch(batch, elapsed_s)
    fair_s = share * sum(spent_s.values())
    assert fair_s - longest_s <= spent_s[BULK] <= fair_s + longest_s


def test_bulk_is_owed_nothing_for_the_time_when_none_of_it_waited() -> None:
    plan = planner(max_batch_size=1)
    for _ in range(100):
        push(plan, 1, priority=INTERACTIVE)
        batch = plan.decide(0.0).batch
        assert batch is not None
        plan.end_batch(batch, 1.0)
    push(plan, 1, 1, priority=BULK)
    push(plan, 1, 1, priority=INTERACTIVE)
    first = plan.decide(0.0).batch
    assert first is not None
    assert first.priority is INTERACTIVE


def test_a_bulk_caller_who_sends_one_after_the_other_gets_no_more_than_its_share() -> None:
    """The bulk queue is empty after each of its batches; interactive requests always wait."""
    plan = planner(max_batch_size=1, bulk_share=0.1)
    spent_s = {INTERACTIVE: 0.0, BULK: 0.0}
    push(plan, *[1] * 10, priority=INTERACTIVE)
    for _ in range(300):
        if not plan.queue.waiting(BULK):
            push(plan, 1, priority=BULK)
        push(plan, 1, priority=INTERACTIVE)
        batch = plan.decide(0.0).batch
        assert batch is not None
        spent_s[batch.priority] += 1.0
        plan.end_batch(batch, 1.0)
    assert spent_s[BULK] == pytest.approx(30, abs=2)


def test_a_lone_request_runs_at_once_when_no_waiting_is_asked_for() -> None:
    plan = planner(max_wait_s=0.0)
    push(plan, 30, at=7.0)
    assert sizes_of(plan.decide(7.0)) == [30]


def expensive(**limits: float | None) -> BatchPlanner[Request[int]]:
    """A planner for batches that cost a second each, whatever is in them."""
    return BatchPlanner(BatchPolicy(**limits), PaddedCostModel(fixed_s=1.0, token_s=0.0))  # type: ignore[arg-type]


def test_an_idle_worker_waits_while_the_next_request_is_expected_to_pay_for_it() -> None:
    """Three that share a batch of a second are worth a third of it each: so long may the next one take."""
    plan = expensive(max_wait_s=0.9)
    push(plan, 30, at=7.0)
    push(plan, 30, at=7.1)
    decision = plan.decide(7.1)
    assert decision.batch is None
    assert decision.wake_s == pytest.approx(7.1 + 1 / 3)
    push(plan, 30, at=7.3)
    assert plan.decide(7.3).wake_s == pytest.approx(7.3 + 1 / 4)
    batch = plan.decide(7.3 + 1 / 4).batch
    assert batch is not None
    assert len(batch.requests) == 3
    assert batch.reason is DispatchReason.IDLE, "the next one took longer than it was worth"


def test_an_idle_worker_waits_no_longer_than_it_may() -> None:
    plan = expensive(max_wait_s=0.15)
    push(plan, 30, at=7.0)
    push(plan, 30, at=7.1)
    assert plan.decide(7.1) == Decision(wake_s=7.15)
    batch = plan.decide(7.15).batch
    assert batch is not None
    assert batch.reason is DispatchReason.AGE


def test_an_idle_worker_does_not_wait_for_requests_that_come_seldom() -> None:
    plan = expensive(max_wait_s=0.9)
    push(plan, 30, at=5.0)
    assert sizes_of(plan.decide(5.0)) == [30], "before the second request nothing is known of the next"
    push(plan, 30, at=7.0)
    assert sizes_of(plan.decide(7.0)) == [30]


def test_an_idle_worker_does_not_wait_where_batches_do_not_pay() -> None:
    plan = BatchPlanner[Request[int]](BatchPolicy(max_wait_s=0.9), PaddedCostModel(fixed_s=0.0, token_s=0.01))
    push(plan, 30, at=7.0)
    push(plan, 30, at=7.1)
    batch = plan.decide(7.1).batch
    assert batch is not None
    assert batch.reason is DispatchReason.IDLE


def test_waiting_ends_in_time_for_a_deadline() -> None:
    plan = expensive(max_wait_s=0.9)
    push(plan, 30, at=7.0)
    plan.push(Request(30, 30, INTERACTIVE, 7.1, deadline_s=8.2))
    assert plan.decide(7.1).wake_s == pytest.approx(7.2)
    batch = plan.decide(7.21).batch
    assert batch is not None
    assert batch.reason is DispatchReason.DEADLINE


def test_a_batch_that_is_full_does_not_wait() -> None:
    plan = planner(max_wait_s=0.5, max_batch_size=3)
    push(plan, 30, 30, 30, at=7.0)
    assert sizes_of(plan.decide(7.0)) == [30, 30, 30]


def test_nothing_is_waited_for_while_draining() -> None:
    plan = expensive(max_wait_s=0.9)
    push(plan, 30, at=7.0)
    push(plan, 31, at=7.1)
    assert sizes_of(plan.decide(7.1, draining=True)) == [30, 31]


@pytest.mark.parametrize("other", [BULK, INTERACTIVE])
def test_nothing_is_held_back_while_the_other_class_waits_too(other: Priority) -> None:
    plan = expensive(max_wait_s=0.9)
    push(plan, 20, 21, priority=INTERACTIVE if other is BULK else BULK, at=7.4)
    push(plan, 30, priority=other, at=7.4)
    first = plan.decide(7.4).batch
    assert first is not None
    assert first.priority is INTERACTIVE


def test_a_batch_that_has_no_room_for_another_request_is_not_held_back_for_one() -> None:
    full = expensive(max_wait_s=0.9, max_batch_size=2)
    push(full, 30, at=7.0)
    push(full, 30, at=7.1)
    batch = full.decide(7.1).batch
    assert batch is not None
    assert batch.reason is DispatchReason.FULL
    alone = expensive(max_wait_s=0.9, max_batch_tokens=40)
    for arrival_s in (6.8, 6.9):
        push(alone, 5, at=arrival_s)
        alone.decide(arrival_s, draining=True)
    push(alone, 40, at=7.0)
    batch = alone.decide(7.0).batch
    assert batch is not None
    assert batch.reason is DispatchReason.BUDGET


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 6), st.integers(100, 400))
def test_no_batch_is_held_back_that_could_not_take_a_request_of_the_mean_size(
    sizes: list[int], max_batch_size: int, max_batch_tokens: int
) -> None:
    plan = expensive(max_wait_s=0.9, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)
    push(plan, *sizes, at=7.0)
    if plan.decide(7.0).batch is None:
        mean = round(sum(sizes) / len(sizes))
        assert len(sizes) < max_batch_size
        assert (len(sizes) + 1) * max(*sizes, mean // 2) <= max_batch_tokens


def test_a_batch_says_why_it_went_as_it_was() -> None:
    def reason(plan: BatchPlanner[Request[int]], now: float = 0.0) -> DispatchReason:
        batch = plan.decide(now).batch
        assert batch is not None
        return batch.reason

    full = planner(max_batch_size=2)
    push(full, 30, 30, 30)
    assert reason(full) is DispatchReason.FULL
    assert reason(full) is DispatchReason.IDLE
    tokens = planner(max_batch_tokens=60)
    push(tokens, 30, 30, 30)
    assert reason(tokens) is DispatchReason.BUDGET
    seconds = planner(max_batch_s=0.005)
    push(seconds, 30, 30, 30)
    assert reason(seconds) is DispatchReason.BUDGET
    overdue = planner(max_age_s=2.0)
    push(overdue, 30)
    assert reason(overdue, now=2.0) is DispatchReason.AGE


def test_a_batch_tells_its_sizes_and_its_predicted_seconds() -> None:
    plan = planner()
    push(plan, 30, 29, 31)
    batch = plan.decide(0.0).batch
    assert batch is not None
    assert (batch.longest, batch.total, batch.padded_tokens) == (31, 90, 93)
    assert batch.predicted_s == COSTS.predict_s(3, 31, 90)


def test_a_few_requests_of_odd_sizes_go_along_where_that_makes_them_all_the_sooner_ready() -> None:
    """Padding one 10 to 60 costs less than a batch of its own; where many wait, they will share one."""
    costs = PaddedCostModel(fixed_s=0.012, token_s=0.0001)
    few = BatchPlanner[Request[int]](BatchPolicy(), costs)
    push(few, 60, 10)
    assert sizes_of(few.decide(0.0)) == [60, 10]
    many = BatchPlanner[Request[int]](BatchPolicy(), costs)
    push(many, 60, *[10] * 20)
    assert sizes_of(many.decide(0.0)) == [60]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 5), st.integers(300, 900))
def test_while_few_wait_all_are_cut_into_the_batches_that_take_the_least_time(
    sizes: list[int], max_batch_size: int, max_batch_tokens: int
) -> None:
    """Checked against every cut of the sorted sizes that has the batch which was chosen."""
    costs = PaddedCostModel(fixed_s=0.006, token_s=0.0001)
    plan = BatchPlanner[Request[int]](
        BatchPolicy(max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens), costs
    )
    push(plan, *sizes)

    def seconds(parts: list[list[int]]) -> float:
        return sum(costs.predict_s(len(part), part[-1], 0) for part in parts)

    def is_allowed(part: list[int]) -> bool:
        return len(part) <= max_batch_size and len(part) * part[-1] <= max_batch_tokens

    by_size = sorted(sizes)
    cuts = [
        [by_size[first:last] for first, last in pairwise((0, *places, len(sizes)))]
        for count in range(len(sizes))
        for places in combinations(range(1, len(sizes)), count)
    ]
    allowed = [parts for parts in cuts if all(map(is_allowed, parts))]
    least_s = min(map(seconds, allowed))
    plan_without_rest = plan.devices[0].former.form(next(iter(plan.queue.front(INTERACTIVE, size_bucket(sizes[0]), 1))))
    chosen = sorted(request.size for request in plan_without_rest.requests)
    assert sizes[0] in chosen
    assert any(chosen in parts and seconds(parts) <= least_s * (1 + 1e-9) for parts in allowed)


def test_who_goes_along_exceeds_no_limit() -> None:
    for limits in (BatchPolicy(max_batch_tokens=100), BatchPolicy(max_batch_s=0.02), BatchPolicy(max_batch_size=1)):
        plan = BatchPlanner[Request[int]](limits, PaddedCostModel(fixed_s=0.012, token_s=0.0001))
        push(plan, 60, 10)
        assert sizes_of(plan.decide(0.0)) == [60]


def test_a_batch_that_was_too_large_keeps_later_ones_below_its_size_until_larger_ones_fit_again() -> None:
    plan = planner(max_batch_size=8)
    plan.record_too_large([30] * 8)
    sizes = []
    for _ in range(200):
        push(plan, *[30] * 8)
        batch = plan.decide(0.0).batch
        assert batch is not None
        sizes.append(len(batch.requests))
        plan.end_batch(batch, 0.01)
        while (rest := plan.decide(0.0).batch) is not None:
            plan.end_batch(rest, 0.01, succeeded=False)
    assert sizes[0] == 4
    assert sizes == sorted(sizes)
    assert sizes[-1] == 8


def test_a_request_above_the_token_limit_still_runs_alone() -> None:
    plan = planner()
    plan.record_too_large([100, 100])
    push(plan, 300, 300)
    assert sizes_of(plan.decide(0.0)) == [300]
    assert sizes_of(plan.decide(0.0)) == [300]


def test_a_batch_of_one_run_teaches_the_cost_model_and_one_that_was_split_does_not() -> None:
    seen = []

    class Pupil(PaddedCostModel):
        def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
            seen.append((count, longest, total, elapsed_s))

    plan = BatchPlanner[Request[int]](BatchPolicy(), Pupil())
    for succeeded in (True, False):
        push(plan, 30, 29)
        batch = plan.decide(0.0).batch
        assert batch is not None
        plan.end_batch(batch, 0.25, succeeded=succeeded)
    assert seen == [(2, 30, 59, 0.25)]


def test_a_long_queue_of_equal_requests_is_decided_in_a_few_steps_even_where_costs_only_add_up() -> None:
    """Rounding makes half a batch seem cheaper by a billionth now and then: that must not lead to 255 steps of one."""
    asked = []

    class Additive(PaddedCostModel):
        def predict_s(self, count: int, longest: int, total: int) -> float:
            asked.append(count)
            return 0.1 * count * longest / 3 + 1e-17 * count

    plan = BatchPlanner[Request[int]](BatchPolicy(max_batch_size=256), Additive())
    push(plan, *[7] * 1000)
    asked.clear()
    assert len(sizes_of(plan.decide(0.0))) == 256
    assert len(asked) < 10


def test_companions_are_of_similar_size_so_that_padding_stays_small() -> None:
    plan = planner()
    push(plan, 30, 200, 31, 199, 29, 28, 201, 30)
    assert sorted(sizes_of(plan.decide(0.0))) == [28, 29, 30, 30, 31]
    assert sorted(sizes_of(plan.decide(0.0))) == [199, 200, 201]


def test_a_large_fixed_cost_makes_larger_batches_worth_their_padding() -> None:
    plan = expensive()
    push(plan, 30, 200, 31, 199, 29, 5, 28, 201, 30)
    assert {28, 29, 30, 31, 199, 200, 201} <= set(sizes_of(plan.decide(0.0)))


def test_a_request_whose_deadline_has_come_is_never_run() -> None:
    plan = planner()
    late = Request(1, 1, INTERACTIVE, 0.0, deadline_s=5.0)
    plan.push(late)
    decision = plan.decide(5.0)
    assert decision.batch is None
    assert decision.expired == [late]


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_tokens", 0),
        ("max_batch_s", 0),
        ("max_wait_s", -1),
        ("max_wait_s", math.inf),
        ("max_queue_items", 0),
        ("max_age_s", -0.1),
        ("bulk_share", 1.0),
    ],
)
def test_a_limit_out_of_range_is_refused_by_name_and_value(limit: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{limit} must be .*, got {value}"):
        planner(**{limit: value})
