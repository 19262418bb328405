"""The clock of waits, and what it saves."""

import time

import pytest

from modalkit.batching import Priority
from modalkit.pipelines import AsyncInputModel
from modalkit.service.backoff import SteadyClock
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import LengthPipeline

pytestmark = pytest.mark.anyio


def test_a_clock_that_is_set_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock()
    before, real = clock(), time.time()
    monkeypatch.setattr(time, "time", lambda: real - 3600)
    assert before <= clock() < before + 60
    assert abs(before - real) < 60


async def test_results_are_delivered_at_once_also_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, pipeline, real = InMemoryBackend(), LengthPipeline(), time.time()
    async with InferenceWorker(pipeline, queue_backend=queue, calibrate=False) as worker:
        pipeline.gate.clear()
        await worker.submit(AsyncInputModel(message={"text": "four"}, success_queue="ok"), priority=Priority.BULK)
        monkeypatch.setattr(time, "time", lambda: real - 3600)
        pipeline.gate.set()
        assert "success" in await queue.receive("ok")
