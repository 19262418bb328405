import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from modalkit.batching import Batch, BatchPlanner, BatchPolicy, CostModel, Decision, MeasuredCostModel, PaddedCostModel
from modalkit.benchmarks.simulate.engine import Rule, Simulation, SimulationError
from modalkit.benchmarks.simulate.metrics import summarize
from modalkit.benchmarks.simulate.rules import Fifo, FixedWindow, SortedFifo, TokenBudget, as_batch
from modalkit.benchmarks.simulate.tables import load_table
from modalkit.benchmarks.simulate.workload import ClosedLoop, IndexedRequest, OpenLoop, bursty, draw_sizes, poisson

TABLE = load_table("t4-fastertransformer")


def make_planner(
    cost_model: CostModel | None = None, max_batch_size: int = 32, max_wait_s: float = 0.0
) -> BatchPlanner[IndexedRequest]:
    policy = BatchPolicy(max_batch_size=max_batch_size, max_wait_s=max_wait_s, max_queue_items=10**9)
    return BatchPlanner(policy, cost_model or MeasuredCostModel())


RULES: dict[str, Callable[[], Rule]] = {
    "planner": make_planner,
    "planner that waits": partial(make_planner, max_wait_s=0.010),
    "fixed window": FixedWindow,
    "token budget": partial(TokenBudget, 1024),
    "sorted": SortedFifo,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nobody_is_lost_and_nobody_starts_before_coming(rule: Callable[[], Rule]) -> None:
    random = np.random.default_rng(3)
    source = OpenLoop(bursty(900.0, 3_000, random), draw_sizes(3_000, random))
    run = Simulation(rule(), source, TABLE.seconds, noise=0.1, seed=3).run()
    answered = ~np.isnan(run.finished_s)
    assert np.count_nonzero(answered) + run.dropped == 3_000
    assert sum(batch.count for batch in run.batches) == np.count_nonzero(answered)
    assert (run.started_s[answered] >= run.arrivals_s[answered]).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_batches_follow_one_another_on_the_one_worker(rule: Callable[[], Rule]) -> None:
    source = ClosedLoop(40, draw_sizes(2_000, np.random.default_rng(4)))
    run = Simulation(rule(), source, TABLE.seconds, noise=0.1, seed=4).run()
    ends_s = [batch.started_s + batch.elapsed_s for batch in run.batches]
    assert all(after.started_s >= end_s for after, end_s in zip(run.batches[1:], ends_s[:-1], strict=True))
    assert not run.dropped


def test_littles_law_holds() -> None:
    """The mean number of requests in the system is the rate of arrivals times the mean time there."""
    random = np.random.default_rng(5)
    source = OpenLoop(poisson(1_500.0, 20_000, random), draw_sizes(20_000, random))
    run = Simulation(make_planner(), source, TABLE.seconds, noise=0.1, seed=5).run()
    times = np.concatenate([run.arrivals_s, run.finished_s])
    changes = np.repeat([1, -1], 20_000)[np.argsort(times, kind="stable")]
    present = np.cumsum(changes)[:-1]
    gaps_s = np.diff(np.sort(times))
    span_s = times.max() - times.min()
    mean_present = float((present * gaps_s).sum() / span_s)
    assert mean_present == pytest.approx(20_000 / span_s * (run.finished_s - run.arrivals_s).mean(), rel=1e-9)


def test_single_requests_of_constant_cost_wait_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: the mean wait is ``load x service / (2 x (1 - load))``."""
    service_s, load, count = 0.01, 0.5, 20_000
    source = OpenLoop(poisson(load / service_s, count, np.random.default_rng(6)), np.full(count, 8))
    rule = make_planner(PaddedCostModel(), max_batch_size=1)
    run = Simulation(rule, source, lambda count, longest, total: service_s).run()
    wait_s = float((run.started_s - run.arrivals_s).mean())
    assert wait_s == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.03)


def test_a_lone_caller_waits_for_nobody() -> None:
    source = ClosedLoop(1, np.full(50, 32))
    run = Simulation(make_planner(), source, TABLE.seconds).run()
    assert run.finished_s - run.arrivals_s == pytest.approx(TABLE.seconds(1, 32))


def test_noise_keeps_the_mean_and_the_seed_repeats_it() -> None:
    def times(seed: int) -> list[float]:
        source = ClosedLoop(1, np.full(5_000, 32))
        run = Simulation(
            FixedWindow(window_s=0.0), source, lambda count, longest, total: 1.0, noise=0.2, seed=seed
        ).run()
        return [batch.elapsed_s for batch in run.batches]

    assert np.mean(times(1)) == pytest.approx(1.0, rel=0.02)
    assert np.std(np.log(times(1))) == pytest.approx(0.2, rel=0.05)
    assert times(1) == times(1)
    assert times(1) != times(2)


def test_a_full_queue_refuses() -> None:
    source = OpenLoop(np.zeros(100), np.full(100, 8))
    run = Simulation(FixedWindow(10), source, TABLE.seconds, max_queue_items=30).run()
    assert run.refused == 70
    assert np.count_nonzero(~np.isnan(run.finished_s)) == 30
    assert summarize(run).turned_away == 0.7


class Broken(Fifo):
    """A rule of which each test breaks something."""

    def __init__(self, decide: Callable[["Broken", float], Decision[IndexedRequest]]) -> None:
        super().__init__()
        self._decide = decide

    def decide(self, now: float) -> Decision[IndexedRequest]:
        return self._decide(self, now)


def test_a_rule_that_stops_the_clock_is_found_out() -> None:
    source = OpenLoop(np.zeros(1), np.ones(1, np.int64))
    with pytest.raises(SimulationError, match="asks for a decision at"):
        Simulation(Broken(lambda rule, now: Decision(wake_s=now)), source, TABLE.seconds).run()


def test_a_rule_that_forgets_a_request_is_found_out() -> None:
    source = OpenLoop(np.zeros(3), np.ones(3, np.int64))
    with pytest.raises(SimulationError, match="lost 3 requests"):
        Simulation(Broken(lambda rule, now: Decision()), source, TABLE.seconds).run()


def test_a_rule_that_runs_a_request_twice_is_found_out() -> None:
    source = OpenLoop(np.zeros(1), np.ones(1, np.int64))
    with pytest.raises(SimulationError, match="runs request 0 twice"):
        Simulation(Broken(lambda rule, now: Decision(as_batch([rule.queue[0]]))), source, TABLE.seconds).run()


def test_each_batch_is_shown_when_it_starts() -> None:
    seen: list[tuple[float, int]] = []

    def on_batch(now: float, batch: Batch[IndexedRequest]) -> None:
        seen.append((now, len(batch.requests)))

    source = OpenLoop(np.array([1.0, 2.0]), np.ones(2, np.int64))
    run = Simulation(FixedWindow(window_s=0.0), source, lambda count, longest, total: 0.1, on_batch=on_batch).run()
    assert seen == [(1.0, 1), (2.0, 1)]
    assert not math.isnan(run.finished_s.sum())
