"""When requests of an open loop are due."""

from itertools import islice
from pathlib import Path

import pytest

from modalkit.benchmarks.load.arrivals import arrival_times


@pytest.mark.parametrize("pattern", ["poisson", "constant", "bursty"])
def test_a_pattern_has_the_rate_that_was_asked_for(pattern: str) -> None:
    times_s = list(islice(arrival_times(pattern, 200), 20_000))
    assert times_s == sorted(times_s)
    assert len(times_s) / times_s[-1] == pytest.approx(200, rel=0.05)


def test_random_times_are_those_of_their_seed() -> None:
    def times(seed: int) -> list[float]:
        return list(islice(arrival_times("poisson", 100, seed=seed), 20))

    assert times(1) == times(1) != times(2)


def test_bursts_come_at_once() -> None:
    times_s = list(islice(arrival_times("bursty", 100), 1000))
    assert len(set(times_s)) < 200


def test_the_processes_of_a_constant_load_take_turns() -> None:
    parts = [list(islice(arrival_times("constant", 10, part, 2), 3)) for part in range(2)]
    assert sorted(parts[0] + parts[1]) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_trace_begins_at_its_first_time_and_may_be_stretched(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 102.0, "input": "x"}\n\n100.5\n101\n')
    assert list(arrival_times(str(trace), None)) == [0, 0.5, 1.5]
    assert list(arrival_times(str(trace), 1)) == [0, 1, 3]
    assert list(arrival_times(str(trace), None, 1, 2)) == [0.5]


@pytest.mark.parametrize(("text", "message"), [("1\nsoon\n", "line 2: 'soon' is no time"), ("\n", "holds no times")])
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    with pytest.raises(ValueError, match=message):
        arrival_times(str(trace), None)
