import numpy as np
import pytest

from modalkit.benchmarks.simulate.workload import (
    ARRIVALS,
    ArrivalKind,
    ClosedLoop,
    OpenLoop,
    bursty,
    corpus_sizes,
    poisson,
)


@pytest.mark.parametrize("kind", ArrivalKind)
def test_arrivals_rise_and_have_the_rate_that_was_asked_for(kind: ArrivalKind) -> None:
    arrivals_s = ARRIVALS[kind](50.0, 200_000, np.random.default_rng(1))
    assert len(arrivals_s) == 200_000
    assert (np.diff(arrivals_s) >= 0).all()
    assert len(arrivals_s) / arrivals_s[-1] == pytest.approx(50.0, rel=0.05)


def test_bursts_make_counts_vary_far_more_than_a_poisson_process_does() -> None:
    def dispersion(arrivals_s: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        counts = np.bincount(arrivals_s.astype(np.int64))
        return float(counts.var() / counts.mean())

    assert dispersion(poisson(50.0, 200_000, np.random.default_rng(1))) == pytest.approx(1.0, abs=0.1)
    assert dispersion(bursty(50.0, 200_000, np.random.default_rng(1))) > 10


def test_the_sizes_are_those_of_the_mixed_length_workload() -> None:
    sizes = corpus_sizes()
    assert len(sizes) == 4_000
    assert np.median(sizes) == pytest.approx(31, abs=6)
    assert np.quantile(sizes, 0.95) / np.median(sizes) > 3


def test_an_open_loop_hands_each_request_over_once_it_has_come() -> None:
    loop = OpenLoop(np.array([1.0, 2.0, 2.0, 5.0]), np.array([7, 8, 9, 10]))
    assert [(request.payload, request.size) for request in loop.take_until(2.0)] == [(0, 7), (1, 8), (2, 9)]
    assert loop.next_s == 5.0
    assert [request.payload for request in loop.take_until(9.0)] == [3]
    assert loop.next_s == np.inf


def test_a_closed_loop_never_has_more_requests_under_way_than_callers() -> None:
    loop = ClosedLoop(2, np.arange(1, 6))
    assert [request.payload for request in loop.take_until(0.0)] == [0, 1]
    assert loop.next_s == np.inf
    loop.done(1, 3.0)
    (request,) = loop.take_until(3.0)
    assert (request.payload, request.arrival_s) == (2, 3.0)
    loop.done(2, 4.0)
    assert [request.payload for request in loop.take_until(4.0)] == [3, 4]
    loop.done(2, 5.0)
    assert loop.next_s == np.inf
