"""A model on several devices: each after the first has a process of its own, and all take batches from one queue."""

import os
import signal
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from modalkit.batching import BatchTimeoutError, Failure, Success
from modalkit.pipelines import InferencePipeline, RejectItem
from modalkit.service import device_process
from modalkit.service.device_process import DevicePipeline, DeviceProcessError, _Process, load_on_devices
from modalkit.service.errors import RetryableError
from modalkit.service.loading import LoadError, ModelSource
from modalkit.service.settings import Settings
from modalkit.service.supervision import GatewayState, Supervisor
from modalkit.service.worker import InferenceWorker
from tests.support.device_pipelines import HeldPipeline, Item, TooLongError

pytestmark = pytest.mark.anyio

CONFIGURATION = """
app_settings:
  batch_config:
    max_batch_size: 4
    max_in_flight: {in_flight}
    batch_timeout_seconds: {timeout_s}
    calibration: {{enabled: false}}
model_settings:
  model_entries:
    where: {{pipeline: "tests.support.device_pipelines:{kind}", devices: [{devices}]}}
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the processes are served by threads alone; each costs a second


@pytest.fixture(autouse=True)
def _fast_restarts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_process, "FIRST_PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)


def source_of(kind: str, devices: str = "a, b", timeout_s: float = 30.0, in_flight: int = 1) -> ModelSource:
    text = CONFIGURATION.format(kind=kind, devices=devices, timeout_s=timeout_s, in_flight=in_flight)
    Path("modalkit.yaml").write_text(text)
    return ModelSource(Settings.load(environ={}), "where")


@asynccontextmanager
async def worker_of(source: ModelSource, first: int = 0) -> AsyncIterator[InferenceWorker]:
    """A worker on the devices of the source from number `first`: on those after 0, all batches cross a pipe."""
    pipelines = await anyio.to_thread.run_sync(load_on_devices, source)
    try:
        async with InferenceWorker(pipelines[first:], settings=source.settings) as worker:
            yield worker
    finally:
        for pipeline in pipelines:
            if isinstance(pipeline, DevicePipeline):
                await anyio.to_thread.run_sync(pipeline.close)


async def outputs_of(worker: InferenceWorker, *texts: str) -> list[Any]:
    outcomes = await worker.predict_many([{"text": text} for text in texts])
    return [outcome.value if isinstance(outcome, Success) else outcome.error for outcome in outcomes]


async def wait_until_gone(process: int) -> None:
    while Path(f"/proc/{process}").exists():
        await anyio.sleep(0.01)


async def test_all_devices_take_batches_from_one_queue() -> None:
    async with worker_of(source_of("WherePipeline", "a, b, c")) as worker:
        texts = [str(number) for number in range(200)]
        outputs = await outputs_of(worker, *texts)
        assert [output.text for output in outputs] == texts
        assert {output.device for output in outputs} == {"a", "b", "c"}
        assert len({output.process for output in outputs}) == 3
        processes = {output.process for output in outputs} - {os.getpid()}
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


async def test_a_call_that_begins_after_its_process_has_ended_is_told_so_at_once() -> None:
    """Though the thread that tells it to all calls has told those that it knew."""
    process = _Process(source_of("WherePipeline"), "b")
    await anyio.to_thread.run_sync(process.wait_until_ready)
    process.end()
    for reader in threading.enumerate():
        if reader.name == "answers of b":
            await anyio.to_thread.run_sync(reader.join)
    with anyio.fail_after(60), pytest.raises(DeviceProcessError, match="process of device b ended"):
        await anyio.to_thread.run_sync(process.call, None, "device_name", abandon_on_cancel=True)


async def test_the_results_of_stages_are_kept_for_as_many_batches_as_run_at_once() -> None:
    process, count = _Process(source_of("WherePipeline"), "b"), 40
    all_are_preprocessed, items = threading.Barrier(count), [Item(text="a")]

    def run(_: int) -> str:
        kept = process.call(None, "preprocess", items)
        all_are_preprocessed.wait(60)
        kept = process.call(None, "predict", items, kept)
        return str(process.call(None, "postprocess", items, kept)[0].text)

    def run_all() -> list[str]:
        process.wait_until_ready()
        try:
            with ThreadPoolExecutor(count) as threads:
                return list(threads.map(run, range(count)))
        finally:
            process.end()

    assert await anyio.to_thread.run_sync(run_all) == ["a"] * count


async def test_in_another_process_a_bad_item_fails_alone_as_it_does_in_this_one() -> None:
    async with worker_of(source_of("WherePipeline"), first=1) as worker:
        good, rejected, failed, busy, late, odd, moved, other = await outputs_of(
            worker, "good", "reject", "fail", "busy", "late", "odd", "remove", "other"
        )
    assert (good.text, other.text, moved.text) == ("good", "other", "remove")
    assert good.process == other.process != os.getpid()
    assert isinstance(rejected, RejectItem)
    assert str(rejected) == "not this one"
    assert isinstance(failed, ArithmeticError)
    assert "tests/support/device_pipelines.py" in "".join(failed.__notes__)
    assert isinstance(busy, RetryableError)
    assert isinstance(late, TimeoutError)
    assert isinstance(odd, ValueError)


async def test_errors_come_from_another_process_as_they_are_and_what_cannot_come_fails_alone() -> None:
    """Whatever arguments their constructors take."""
    async with worker_of(source_of("WherePipeline"), first=1) as worker:
        good, raised, returned, unreadable, unwritable, other = await outputs_of(
            worker, "good", "too long", "long", "unreadable", "lambda", "other"
        )
    assert (good.text, other.text) == ("good", "other")
    assert [type(raised), str(raised), raised.length] == [TooLongError, "8 letters, at most 4", 8]
    assert [type(returned), str(returned), returned.length] == [TooLongError, "4 letters, at most 3", 4]
    assert isinstance(unreadable, ValueError)
    assert "no number" in str(unreadable)
    assert "cannot go to another process" in str(unwritable)


@pytest.mark.parametrize("how", ["kill", "lose"])
async def test_a_process_that_is_killed_or_loses_its_device_is_started_again_and_no_caller_notices(how: str) -> None:
    async with worker_of(source_of("WherePipeline"), first=1) as worker:
        (before,) = await outputs_of(worker, "before")
        outputs = await outputs_of(worker, "one", how, "two")
        assert [output.text for output in outputs] == ["one", how, "two"]
        assert {output.process for output in outputs}.isdisjoint({before.process, os.getpid()})
        os.kill(outputs[0].process, signal.SIGKILL)
        await wait_until_gone(outputs[0].process)
        (after,) = await outputs_of(worker, "after")
        assert after.process not in {before.process, outputs[0].process}


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_an_item_that_kills_each_process_fails_alone_though_other_batches_run_there(in_flight: int) -> None:
    texts = ["a", "b", "c", "d", "e", "die", "g", "h", "i", "j", "k", "l"]
    async with worker_of(source_of("WherePipeline", in_flight=in_flight), first=1) as worker:
        outputs = await outputs_of(worker, *texts)
    assert [getattr(output, "text", "die") for output in outputs] == texts
    assert [isinstance(output, DeviceProcessError) for output in outputs] == [text == "die" for text in texts]


async def test_the_first_batches_of_a_process_that_was_started_again_may_be_slow_and_change_no_costs() -> None:
    """It may compile something for each number of requests, as the one before it did."""
    counts = (2, 3, 4)
    async with worker_of(source_of("WherePipeline"), first=1) as worker:
        (before,) = await outputs_of(worker, "before")
        os.kill(before.process, signal.SIGKILL)
        await wait_until_gone(before.process)
        for count in counts * 10:
            worker.costs.observe(count, 1, count, 0.001 * count)
        await outputs_of(worker, "after")
        expected_s = [worker.costs.predict_s(count, 1, count) for count in counts]
        for count in counts:
            worker.costs.observe(count, 1, count, 10.0)
        assert [worker.costs.predict_s(count, 1, count) for count in counts] == expected_s


async def test_a_process_that_could_not_be_started_again_gets_no_batch_until_it_is() -> None:
    async with worker_of(source_of("BreakablePipeline"), first=1) as worker:
        (before,) = await outputs_of(worker, "before")
        Path("broken").touch()
        os.kill(before.process, signal.SIGKILL)
        await wait_until_gone(before.process)
        (pipeline,) = worker.pipelines
        assert isinstance(pipeline, DevicePipeline)
        for _ in range(2):
            with pytest.raises(LoadError, match="the device is broken"):
                await anyio.to_thread.run_sync(pipeline.preparation.run)
            assert pipeline.preparation.is_needed()
        Path("broken").unlink()
        (after,) = await outputs_of(worker, "after")
        assert after.text == "after"


async def test_no_process_outlives_a_pipeline_that_is_closed_while_it_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, pipeline = await anyio.to_thread.run_sync(load_on_devices, source_of("WherePipeline"))
    assert isinstance(pipeline, DevicePipeline)
    started: list[_Process] = []

    def close_and_start(source: ModelSource, device: str) -> _Process:
        pipeline.close()
        started.append(_Process(source, device))
        return started[0]

    pipeline._process.kill()  # noqa: SLF001  # as a crash does
    monkeypatch.setattr(device_process, "_Process", close_and_start)
    try:
        await anyio.to_thread.run_sync(pipeline.preparation.run)
        assert started[0].has_ended
    finally:
        started[0].kill()


async def test_no_process_outlives_a_load_that_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[_Process] = []

    def start(source: ModelSource, device: str) -> _Process:
        started.append(_Process(source, device))
        return started[0]

    monkeypatch.setattr(device_process, "_Process", start)
    supervisor = Supervisor(source_of("HeldPipeline"), GatewayState())
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(supervisor.load)
        await anyio.to_thread.run_sync(HeldPipeline.began.wait)
        task_group.cancel_scope.cancel()
    HeldPipeline.may_end.set()
    with anyio.fail_after(60):
        while not started[0].has_ended:
            await anyio.sleep(0.01)


async def test_a_batch_that_hangs_does_not_keep_its_device() -> None:
    async with worker_of(source_of("WherePipeline", timeout_s=0.5), first=1) as worker:
        good, hanging = await outputs_of(worker, "good", "hang")
        assert isinstance(hanging, BatchTimeoutError)
        assert good.text == "good"
        (after,) = await outputs_of(worker, "after")
        assert after.text == "after"


async def test_a_pipeline_of_one_stage_runs_elsewhere_too() -> None:
    async with worker_of(source_of("AsOnePipeline"), first=1) as worker:
        (output,) = await outputs_of(worker, "a")
        assert output.process != os.getpid()


async def test_pieces_come_from_another_process_one_by_one_and_can_be_stopped() -> None:
    async with worker_of(source_of("PiecesPipeline"), first=1) as worker:
        pieces = [piece async for piece in worker.predict_stream({"text": "abc"})]
        assert [getattr(piece, "text", "") for piece in pieces] == ["a", "ab", "abc"]
        async with aclosing(worker.predict_stream({"text": ""})) as endless:
            await anext(endless)
        assert [outcome.text for outcome in await outputs_of(worker, "ab")] == ["ab"]


async def test_no_caller_gets_the_pieces_of_another_where_a_list_is_sorted_in_another_process() -> None:
    found: dict[str, list[str]] = {}

    async def stream(text: str, worker: InferenceWorker) -> None:
        found[text] = [getattr(piece, "text", "") async for piece in worker.predict_stream({"text": text})]

    async with worker_of(source_of("SortingPipeline"), first=1) as worker, anyio.create_task_group() as callers:
        for text in ("first", "abc", "de", "f"):
            callers.start_soon(stream, text, worker)
    assert {text: pieces[-1] for text, pieces in found.items()} == {text: text for text in found}
    assert all(text.startswith(piece) for text, pieces in found.items() for piece in pieces)


async def test_all_pieces_of_a_batch_come_within_the_batch_timeout_or_its_process_is_ended() -> None:
    async with worker_of(source_of("PiecesPipeline", timeout_s=2.0), first=1) as worker:
        (before,) = await outputs_of(worker, "before")
        (endless,) = await outputs_of(worker, "")
        (after,) = await outputs_of(worker, "after")
    assert isinstance(endless, BatchTimeoutError)
    assert (after.text, after.process != before.process) == ("after", True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OnlyHerePipeline", "where.devices: b: .*there is no device b"),
        (
            "AsynchronousPipeline",
            "where.devices: b: an asynchronous .* on several devices; set max_in_flight",
        ),
    ],
)
async def test_a_device_that_cannot_be_used_is_named_at_the_start(kind: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        await anyio.to_thread.run_sync(load_on_devices, source_of(kind))


async def test_one_device_needs_no_other_process() -> None:
    (pipeline,) = await anyio.to_thread.run_sync(load_on_devices, source_of("WherePipeline", "a"))
    assert not isinstance(pipeline, DevicePipeline)
    assert isinstance(pipeline, InferencePipeline)
    assert not isinstance(pipeline, Failure)
