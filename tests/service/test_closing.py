"""A pipeline is closed once, by the worker that owns it."""

import threading
from typing import Any

import anyio
import pytest

from modalkit.batching import SchedulerClosedError, executors
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


class Lingering(Held):
    """Runs a batch until it is closed, but for a tenth of a second at most, or as long as it `hangs`."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__()
        self.began, self.is_closed, self.may_end = threading.Event(), threading.Event(), threading.Event()
        self.hangs = hangs

    def run_inference(self, input_list: list[Any]) -> list[InferenceOutputModel]:
        outputs = super().run_inference(input_list)
        self.began.set()
        self.is_closed.wait(0.1)
        if self.hangs:
            self.may_end.wait(60)
        self.note("end")
        return outputs

    def close(self) -> None:
        super().close()
        self.is_closed.set()


@pytest.mark.parametrize(("hangs", "calls"), [(False, ["run", "end", "close"]), (True, ["run", "close"])])
async def test_a_batch_that_runs_where_the_owner_is_cancelled_ends_before_it_is_closed_unless_it_hangs(
    hangs: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "MAX_CLOSE_S", 2.0)
    pipeline = Lingering(hangs=hangs)

    async def call(worker: InferenceWorker) -> None:
        with pytest.raises(SchedulerClosedError):
            await worker.predict({})

    async with anyio.create_task_group() as callers:
        with anyio.CancelScope() as scope:
            async with InferenceWorker(pipeline) as worker:
                callers.start_soon(call, worker)
                await anyio.to_thread.run_sync(pipeline.began.wait)
                scope.cancel()
    assert [name for name, _ in pipeline.calls] == calls
    pipeline.may_end.set()


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


class ColdAndStubborn(Cold):
    async def close(self) -> None:  # type: ignore[override]  # as users may
        self.note("close")
        raise OSError("never connected")


async def test_one_that_is_refused_is_closed_and_the_reason_is_told_whatever_closing_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = ColdAndStubborn()
    async with InferenceWorker(Held()) as worker:
        with pytest.raises(LoadError, match="no driver"):
            await worker.replace([refused], worker.limits)
        await worker.predict({})
    assert [name for name, _ in refused.calls] == ["close"]
    assert "never connected" in caplog.text
