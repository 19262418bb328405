"""A pipeline is closed once, by the worker that owns it."""

import threading
from typing import Any

import pytest

from modalkit.batching import executors
from modalkit.pipelines import EngineError, InferenceOutputModel, InferencePipeline
from modalkit.pipelines.sentiment import SentimentPipeline, SentimentRequest
from modalkit.service.loading import LoadError
from modalkit.service.worker import InferenceWorker
from modalkit.testing import worker_of
from tests.support.tiny_models import EXACT

pytestmark = pytest.mark.anyio


class Held(InferencePipeline):
    """Writes down what is called, and in which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def note(self, name: str) -> None:
        self.calls.append((name, threading.get_ident()))

    def run_inference(self, input_list: list[Any]) -> list[InferenceOutputModel]:
        self.note("run")
        return [InferenceOutputModel() for _ in input_list]

    def close(self) -> None:
        self.note("close")


class Connected(Held):
    async def run_inference(self, input_list: list[Any]) -> list[InferenceOutputModel]:  # type: ignore[override]  # as users may
        return Held.run_inference(self, input_list)

    async def close(self) -> None:  # type: ignore[override]  # as users may
        self.note("close")


class Cold(Held):
    def warm_up(self) -> None:
        raise RuntimeError("no driver")


class Stubborn(Held):
    def close(self) -> None:
        raise OSError("the connection is gone")


async def test_it_is_closed_once_after_the_last_batch_in_its_thread() -> None:
    pipeline = Held()
    async with InferenceWorker(pipeline) as worker:
        await worker.predict_many([{}, {}])
    names, threads = zip(*pipeline.calls, strict=True)
    assert names == ("run", "close")
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_an_asynchronous_close_is_awaited() -> None:
    pipeline = Connected()
    async with InferenceWorker(pipeline) as worker:
        await worker.predict({})
    assert pipeline.calls == [("run", threading.get_ident()), ("close", threading.get_ident())]


async def test_it_is_closed_where_the_warm_up_or_the_owner_fails() -> None:
    cold, held = Cold(), Held()
    with pytest.raises(LoadError, match="no driver"):
        async with InferenceWorker(cold):
            pass
    with pytest.raises(LookupError):
        async with InferenceWorker(held):
            raise LookupError
    assert [name for name, _ in cold.calls + held.calls] == ["close", "close"]


async def test_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with InferenceWorker(Stubborn()):
        pass
    assert "Stubborn: closing failed" in caplog.text
    assert "the connection is gone" in caplog.text


async def test_a_close_that_hangs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(executors, "MAX_CLOSE_S", 0.01)
    ended = threading.Event()
    pipeline = Held()
    monkeypatch.setattr(pipeline, "close", ended.wait)
    async with InferenceWorker(pipeline):
        pass
    assert "closing failed" in caplog.text
    ended.set()


async def test_a_worker_that_does_not_own_it_leaves_it_open() -> None:
    pipeline = Held()
    async with InferenceWorker(pipeline, owns_pipeline=False):
        pass
    assert pipeline.calls == []


async def test_the_engine_of_a_model_is_freed() -> None:
    async with worker_of(SentimentPipeline, model_path="bundled", **EXACT) as worker:
        item = SentimentRequest(text="What a lovely day!")
        await worker.predict(item)
    with pytest.raises(EngineError, match="closed"):
        worker.pipeline.run_inference([item])
