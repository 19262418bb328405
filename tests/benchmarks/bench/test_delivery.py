"""What is counted of accepted jobs and their messages."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from modalkit.benchmarks.bench.delivery import Receiver, wait_for_deliveries
from tests.benchmarks.bench.test_results import timeline_run

JOBS = [b"job-%d" % number for number in range(50)]


class Messages(list[Any]):
    """Counts how many of its messages were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        Messages.looked_at += len(self)
        return super().__iter__()

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        Messages.looked_at += len(found)
        return found


def test_each_message_is_looked_at_once_while_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.perf_counter()
    accepted = [(0, now_s, b'{"job_id":"%s"}' % job) for job in JOBS]
    measured = replace(timeline_run([0.1], items=1), kept=accepted)
    messages = Messages([(JOBS[0], now_s + 1), (JOBS[0], now_s + 2), (b"another", now_s)])
    later = iter(JOBS[1:])
    monkeypatch.setattr(time, "sleep", lambda _: messages.append((next(later), now_s + 3)))
    told: list[int] = []
    found = wait_for_deliveries(measured, Receiver("queue", {}, messages), told.append)
    assert (found.accepted, found.delivered, found.duplicates, found.lost) == (50, 50, 1, 0)
    assert found.p50_s == pytest.approx(3)
    assert found.delivered_per_s == pytest.approx(50 / 3)
    assert Messages.looked_at == len(messages)
    assert told == list(range(1, 51))


def test_what_is_delivered_in_the_measured_time_is_counted_apart() -> None:
    begin_s = time.perf_counter()
    job_ids = [b"job-%d" % number for number in range(150)]
    accepted = [(0, begin_s + number / 100, b'{"job_id":"%s"}' % job) for number, job in enumerate(job_ids)]
    messages = [(job, begin_s + number / 100 + 0.5) for number, job in enumerate(job_ids)]
    measured = replace(timeline_run([0.1], items=1), kept=accepted, begin_s=begin_s + 0.505, elapsed_s=0.99)
    found = wait_for_deliveries(measured, Receiver("queue", {}, messages))
    assert found.delivered_per_s == pytest.approx(150 / 1.99)
    assert found.in_time_per_s == pytest.approx(100)
