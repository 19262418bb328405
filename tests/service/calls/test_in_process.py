"""The engine of this process, beyond what every engine promises."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import pytest

from modalkit.batching import Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.calls.engine import CallOptions, CallState
from modalkit.service.calls.in_process import Faults, InProcessEngine, WorkerLostError, in_process_gateway
from modalkit.service.calls.processor import Call
from modalkit.service.errors import RemoteCallError, RemoteTimeoutError
from modalkit.service.jobs import JobStatus
from modalkit.service.queue_backends import InMemoryBackend
from tests.support.length_model import LengthPipeline, Text

pytestmark = pytest.mark.anyio

KEPT = CallOptions(accepted_at=0.0)


async def test_a_gateway_over_it_predicts_and_keeps_and_delivers_jobs() -> None:
    queue = InMemoryBackend()
    async with in_process_gateway(LengthPipeline(), InProcessEngine(), queue_backend=queue) as gateway:
        assert list(gateway.models) == ["lengths"]
        output = await gateway.models["lengths"].predict(Text(text="four"))
        assert isinstance(output, InferenceOutputModel)
        assert output.model_dump()["length"] == 4
        request = AsyncInputModel(message={"text": "four"}, success_queue="ok")
        (submitted,) = await gateway.jobs.submit([request], model_name="lengths")
        assert isinstance(submitted, Success)
        job = await gateway.jobs.get(submitted.value, 30)
    assert job is not None
    assert (job.status, (job.result or {})["length"]) == (JobStatus.SUCCEEDED, 4)
    assert [json.loads(text)["job_id"] for text in queue.messages("ok")] == [job.job_id]


async def test_a_run_that_loses_its_worker_is_repeated_however_often() -> None:
    runs = 0

    async def run(entries: Sequence[Any], call: Call) -> Sequence[Mapping[str, Any]]:
        nonlocal runs
        runs += 1
        if runs <= 3:
            async with anyio.create_task_group():  # as a processor raises it, in a group
                raise WorkerLostError
        return [{"entry": entry} for entry in entries]

    async with InProcessEngine() as engine:
        engine.attach("m", run)
        assert await engine.call("m", ["a"], CallOptions()) == [{"entry": "a"}]
    assert runs == 4


async def test_a_call_that_takes_too_long_has_timed_out() -> None:
    async def run(entries: Sequence[Any], call: Call) -> Sequence[Mapping[str, Any]]:
        await anyio.sleep_forever()
        return []

    async with InProcessEngine(timeout_s=0.01) as engine:
        engine.attach("m", run)
        with pytest.raises(RemoteTimeoutError, match=r"longer than 0\.01 s"):
            await engine.call("m", [], CallOptions())
        result = await engine.result(await engine.enqueue("m", [], KEPT), 30)
        assert result.state is CallState.TIMED_OUT


async def test_a_call_that_raises_is_repeated_as_often_as_its_engine_is_told() -> None:
    runs = 0

    async def run(entries: Sequence[Any], call: Call) -> Sequence[Mapping[str, Any]]:
        nonlocal runs
        runs += 1
        raise TimeoutError("its own")  # and no time limit of the engine's

    async with InProcessEngine(retries=2) as engine:
        engine.attach("m", run)
        with pytest.raises(RemoteCallError, match="TimeoutError: its own"):
            await engine.call("m", [], CallOptions())
    assert runs == 3


async def test_a_call_of_which_its_caller_waits_is_kept_for_no_other() -> None:
    async def run(entries: Sequence[Any], call: Call) -> Sequence[Mapping[str, Any]]:
        return []

    async with InProcessEngine() as engine:
        engine.attach("m", run)
        await engine.call("m", [], CallOptions())
        (call_id,) = engine.calls
        assert (await engine.result(call_id, 0.0)).state is CallState.UNKNOWN


async def test_outside_its_block_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="inside its 'async with' block"):
        await InProcessEngine(faults=Faults()).enqueue("m", [], KEPT)
