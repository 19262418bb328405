"""How a pipeline's batches run: in stages or as one, and what counts as too large."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import anyio
import numpy as np
import onnx.helper
import onnxruntime
import pytest
import torch
from pydantic import BaseModel

from modalkit.batching import BatchScheduler, Success
from modalkit.batching.errors import InputsMovedError
from modalkit.pipelines import BatchTooLargeError, InferenceOutputModel
from modalkit.service.pipeline_batches import at_full_load, is_too_large, run_batch_of
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import POISON, Length, LengthPipeline, Text

NO_CALIBRATION = Settings(app_settings={"batch_config": {"max_batch_size": 64, "calibration": {"enabled": False}}})


class OwnWay(LengthPipeline):
    """Overrides `run_inference`, as the documentation allows."""

    calls = 0

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        self.calls += 1
        return [Length(length=-1) for _ in input_list]


@pytest.mark.anyio
async def test_a_pipeline_with_its_own_run_inference_is_run_by_it_alone() -> None:
    pipeline = OwnWay()
    async with InferenceWorker(pipeline, settings=NO_CALIBRATION) as worker:
        calls = pipeline.calls
        assert await worker.predict(Text(text="four")) == Length(length=-1)
    assert pipeline.calls == calls + 1
    assert pipeline.batches == []


@pytest.mark.anyio
async def test_a_tuple_of_outputs_is_checked_like_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LengthPipeline()
    monkeypatch.setattr(pipeline, "postprocess", lambda *_: (InferenceOutputModel(status="error", error="no"),))
    async with InferenceWorker(pipeline, settings=NO_CALIBRATION) as worker:
        with pytest.raises(Exception, match="no"):
            await worker.predict(Text(text="four"))


class Paired(LengthPipeline):
    """Runs two batches at once, and notes how many it was told of."""

    max_in_flight = 2

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def before_predict(self, in_flight: int) -> None:
        self.told.append(in_flight)


@pytest.mark.anyio
@pytest.mark.parametrize("configured", [None, 1, 3])
async def test_as_many_batches_run_at_once_as_the_pipeline_says_or_the_settings(configured: int | None) -> None:
    pipeline = Paired()
    settings = Settings(
        app_settings={
            "batch_config": {"max_batch_size": 1, "max_in_flight": configured, "calibration": {"enabled": False}}
        }
    )
    expected = configured or 2
    async with InferenceWorker(pipeline, settings=settings) as worker:
        assert pipeline.entered.acquire(timeout=60), "the warm-up has run"
        pipeline.batches.clear()
        pipeline.gate.clear()
        async with anyio.create_task_group() as task_group:
            for _ in range(4):
                task_group.start_soon(worker.predict, Text(text="four"))
            for _ in range(expected):
                assert await anyio.to_thread.run_sync(pipeline.entered.acquire, True, 60)
            await anyio.wait_all_tasks_blocked()
            assert len(pipeline.batches) == expected
            pipeline.gate.set()
        under_load = len(pipeline.told)
        await worker.predict(Text(text="four"))
    if expected > 1:
        assert pipeline.told[:expected] == [expected] * expected, "those that begin at once are counted"
        assert max(pipeline.told) == expected
        assert pipeline.told[under_load:] == [1]
    else:
        assert pipeline.told == []


@pytest.mark.anyio
async def test_costs_are_measured_with_as_many_batches_at_once_as_under_load() -> None:
    pipeline = Paired()
    async with InferenceWorker(pipeline) as worker:
        assert worker.costs.observed
    assert set(pipeline.told) == {2}
    assert len(pipeline.told) == len(pipeline.batches) - 1, "the warm-up runs alone"


def test_an_error_in_one_of_the_batches_at_once_is_raised() -> None:
    class Failing(Paired):
        def before_predict(self, in_flight: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError("no room for two")

    with pytest.raises(MemoryError, match="no room for two"):
        at_full_load(Failing(), 2)([Text(text="four")])


@pytest.mark.anyio
async def test_warm_up_runs_in_the_thread_of_the_batches() -> None:
    class Noting(LengthPipeline):
        threads: ClassVar[list[str]] = []

        def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
            self.threads.append(threading.current_thread().name)
            return super().predict(input_list, preprocessed_data)

    async with InferenceWorker(Noting("model"), settings=NO_CALIBRATION) as worker:
        await worker.predict(Text(text="four"))
    assert Noting.threads == ["model 0", "model 0"]


class Small(LengthPipeline):
    """Has room for 3 items at a time."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if len(input_list) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().predict(input_list, preprocessed_data)


@pytest.mark.anyio
async def test_every_item_of_a_batch_that_is_out_of_memory_gets_its_result_and_a_poisoned_one_its_error() -> None:
    pipeline = Small()
    async with InferenceWorker(pipeline, settings=NO_CALIBRATION) as worker:
        texts = ["x" * n for n in range(1, 64)]
        assert await worker.predict_many([Text(text=text) for text in texts]) == [
            Success(Length(length=len(text))) for text in texts
        ]
        outcomes = await worker.predict_many([Text(text=text) for text in (*texts, POISON)])
    assert [index for index, outcome in enumerate(outcomes) if not isinstance(outcome, Success)] == [63]
    assert max(map(len, pipeline.batches)) <= 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        BatchTooLargeError("64 images do not fit"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7406166528 bytes."),  # JAX
    ],
)
def test_what_says_that_memory_ran_out_means_that_the_batch_was_too_large(error: Exception) -> None:
    assert is_too_large(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert"), ValueError("out of memory"), OSError()]
)
def test_other_errors_do_not(error: Exception) -> None:
    assert not is_too_large(error)


def test_what_onnx_runtime_says_when_it_is_out_of_memory_is_known() -> None:
    """Its errors are no `RuntimeError`."""
    sizes = [onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])]
    values = [onnx.helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, [None])]
    graph = onnx.helper.make_graph([onnx.helper.make_node("ConstantOfShape", ["size"], ["values"])], "g", sizes, values)
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 13)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="requested buffer of size") as caught:
        session.run(None, {"size": np.array([2**50])})
    assert is_too_large(caught.value)


def test_what_torch_says_when_a_cpu_is_out_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_too_large(caught.value)


@pytest.mark.parametrize("change", [lambda items: items.sort(key=lambda item: len(item.text)), list.reverse, list.pop])
@pytest.mark.anyio
async def test_a_group_whose_items_a_stage_moves_gets_an_error_and_no_result_of_another(
    change: Callable[[list[Any]], object],
) -> None:
    class Moving(LengthPipeline):
        def preprocess(self, input_list: list[Any]) -> dict[str, Any]:
            change(input_list)
            return super().preprocess(input_list)

    items = [Text(text="the longest"), Text(text="b"), Text(text="long")]
    async with BatchScheduler(run_batch_of(Moving())) as scheduler:
        with pytest.raises(InputsMovedError):
            await scheduler.run_as_one_batch(items)
