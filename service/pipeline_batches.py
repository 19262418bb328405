"""Runs the batches of a pipeline, and classifies failures: of batches that were too large, and of the device."""

import asyncio
import inspect
import re
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from threading import Lock, Thread
from types import CoroutineType
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from modalkit.batching import BatchPolicy, RunBatch, Stages
from modalkit.batching.errors import as_exception, users_error
from modalkit.batching.execution import checked_outputs, ensure_order
from modalkit.pipelines import BatchTooLargeError, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.pipelines.inference_pipeline import STAGES, has_own, is_asynchronous
from modalkit.service.errors import (
    NotAwaitedError,
    PipelineOutputError,
    RetryableError,
    describe_error,
    error_text,
    lone_error,
)
from modalkit.service.settings import BatchConfig
from modalkit.service.streams import Payload, StreamRun
from modalkit.service.validation import validated

P = ParamSpec("P")
T = TypeVar("T")

Outputs = Sequence[InferenceOutputModel | Exception]

_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can.t allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|failed to allocate memory|OOM when allocating",  # ONNX Runtime, TensorFlow
    re.IGNORECASE,  # JAX begins a sentence with it
)
_FRAMEWORKS = ("onnxruntime.", "tensorflow.")
"""Where errors are defined that are no ``RuntimeError``."""
_DEVICE_FAULT = re.compile(
    r"CUDA error|HIP error|device-side assert|an illegal memory access|unspecified launch failure"
    r"|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)"
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)
# After these a context goes on working; they are the fault of a call, or of the build ("cudaError", CUDA Runtime API).
_FAULT_OF_THE_CALL = re.compile(
    r"invalid (configuration )?argument|invalid device (function|ordinal)|no kernel image"
    r"|CUBLAS_STATUS_(INVALID_VALUE|NOT_SUPPORTED|ARCH_MISMATCH)"
)

_AWAITABLES = (CoroutineType, asyncio.Future)


def batch_policy(config: BatchConfig) -> BatchPolicy:
    """The scheduler's limits as the configuration gives them."""
    return BatchPolicy(
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_s=config.max_batch_seconds,
        max_wait_s=config.wait_ms / 1000,
        max_queue_items=config.max_queue_size,
        max_queue_s=config.max_queue_seconds,
        max_age_s=config.max_age_ms / 1000,
        max_bulk_batch_s=None if config.max_bulk_batch_ms == "auto" else config.max_bulk_batch_ms / 1000,
    )


def max_in_flight_of(pipeline: InferencePipeline, config: BatchConfig) -> int:
    """How many batches of the pipeline run at once: as configured, else as it says."""
    return config.max_in_flight or pipeline.max_in_flight


def is_asynchronous_pipeline(pipeline: InferencePipeline) -> bool:
    """Whether batches of the pipeline run in the event loop, or a stage of them does."""
    if has_own(pipeline, "predict_stream"):
        return is_asynchronous(pipeline, "predict_stream")
    return is_asynchronous(pipeline, *(("run_inference",) if has_own(pipeline, "run_inference") else STAGES))


def run_batch_of(
    pipeline: InferencePipeline, max_in_flight: int = 1, demand: Callable[[], int] = lambda: 0
) -> RunBatch[Any, InferenceOutputModel]:
    """The pipeline's three stages, or its `predict_stream` or `run_inference` where the class has its own.

    Payloads are items; with a `predict_stream` also `StreamedItem`. `demand` is an upper bound of the batches that
    run or wait, for `before_predict`.
    """
    if has_own(pipeline, "predict_stream"):
        return _stream_of(pipeline, max_in_flight, demand)

    async def preprocess(items: list[BaseModel]) -> tuple[_Accepted, Any]:
        accepted = _Accepted(pipeline, len(items))
        return accepted, await accepted.call("preprocess", items, repeats=True)

    async def predict(items: list[BaseModel], prepared: tuple[_Accepted, Any]) -> tuple[_Accepted, Any]:
        accepted, preprocessed = prepared
        return accepted, await accepted.call("predict", items, preprocessed)

    async def postprocess(items: list[BaseModel], predicted: tuple[_Accepted, Any]) -> Outputs:
        accepted, raw_output = predicted
        return accepted.outputs(await accepted.call("postprocess", items, raw_output))

    async def run_inference(items: list[BaseModel]) -> Outputs:
        accepted = _Accepted(pipeline, len(items))
        return accepted.outputs(await accepted.call("run_inference", items, repeats=True))

    def as_defined(run: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Any]:
        """`run` as a synchronous function, unless the method of its name is asynchronous."""
        if is_asynchronous(pipeline, run.__name__):
            return run
        function = _synchronous(run)
        return function if run in (preprocess, postprocess) else _counted(pipeline, max_in_flight, demand, function)

    if has_own(pipeline, "run_inference"):
        return as_defined(run_inference)
    return Stages(as_defined(preprocess), as_defined(predict), as_defined(postprocess))


def _stream_of(
    pipeline: InferencePipeline, max_in_flight: int, demand: Callable[[], int]
) -> RunBatch[Payload, InferenceOutputModel]:
    async def stream_in_event_loop(payloads: list[Payload]) -> Outputs:
        run = StreamRun(payloads, partial(_checked, pipeline), in_thread=False)
        if run.items:
            with run.errors(), _transient_errors(pipeline):
                steps: Any = pipeline.predict_stream(run.items)
                async with aclosing(steps):
                    async for step in steps:
                        if not run.take(step):
                            break
        return run.outputs()

    def stream(payloads: list[Payload]) -> Outputs:
        run = StreamRun(payloads, partial(_checked, pipeline), in_thread=True)
        if run.items:
            with run.errors(), _transient_errors(pipeline):
                steps = pipeline.predict_stream(run.items)
                _ensure_awaited("predict_stream", steps)
                try:
                    for step in steps:
                        if not run.take(step):
                            break
                finally:
                    if inspect.isgenerator(steps):
                        steps.close()
        return run.outputs()

    if is_asynchronous(pipeline, "predict_stream"):
        return stream_in_event_loop
    return _counted(pipeline, max_in_flight, demand, stream)


def _synchronous(run: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """A coroutine function that never waits, as a function."""

    def function(*args: P.args, **kwargs: P.kwargs) -> T:
        coroutine = run(*args, **kwargs)
        try:
            coroutine.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
        coroutine.close()
        raise RuntimeError("a method of the pipeline became an 'async def' after its worker was made")

    return function


class _Accepted:
    """The items of a batch of `count` that the pipeline has not rejected."""

    def __init__(self, pipeline: InferencePipeline, count: int) -> None:
        self._pipeline = pipeline
        self._count = count
        self._places: Sequence[int] = range(count)
        self._rejected: dict[int, RejectItem] = {}

    async def call(self, name: str, items: list[BaseModel], *data: Any, repeats: bool = False) -> Any:
        """Call a method with those of `items` that are accepted; returns None if there are none.

        With `repeats`, it is called again for the others when it rejects an item of several by its index. Waits only
        for an asynchronous method. Raises what else the method raises, `InputsMovedError` and `NotAwaitedError`.
        """
        # Looked up at each call, as `InferencePipeline.run_inference` does, so that one that is replaced takes effect.
        method = getattr(self._pipeline, name)
        while self._places:
            sent = [items[place] for place in self._places] if self._rejected else items
            given = list(sent)
            try:
                result = method(given, *data)
                if isinstance(result, CoroutineType) and inspect.iscoroutinefunction(method):
                    result = await result
            except Exception as raised:  # as `_transient_errors`, without the cost of a context manager
                if not self._rejects(raised, by_index=repeats):
                    if _is_transient(self._pipeline, raised):
                        raise RetryableError(raised) from raised
                    raise
            else:
                ensure_order(sent, given)
                _ensure_awaited(name, result)
                return result
        return None

    def outputs(self, outputs: Any) -> Outputs:
        """The outputs of all items of the batch, from those of the accepted ones. Raises `OutputCountError`."""
        if not self._rejected:
            return _checked_all(self._pipeline, outputs)
        accepted = checked_outputs(outputs, len(self._places)) if self._places else []
        found = self._rejected | dict(zip(self._places, _checked_all(self._pipeline, accepted), strict=True))
        return [found[place] for place in range(self._count)]

    def _rejects(self, raised: Exception, *, by_index: bool) -> bool:
        """Whether an error rejects an item, and it is known which one: the only one, or the one that it names."""
        error = lone_error(raised)
        if not isinstance(error, RejectItem):
            return False
        index = 0
        if len(self._places) > 1:
            if not by_index or error.index is None or not 0 <= error.index < len(self._places):
                return False
            index = error.index
        self._rejected[self._places[index]] = error.with_traceback(None)  # its frames refer to this object
        self._places = [place for place in self._places if place not in self._rejected]
        return True


def _counted(
    pipeline: InferencePipeline, max_in_flight: int, demand: Callable[[], int], run: Callable[P, T]
) -> Callable[P, T]:
    """`run`, with a call of `before_predict` before each call, if batches may run at once."""
    if max_in_flight == 1:
        return run
    lock = Lock()
    in_flight = 0

    def counted(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal in_flight
        with lock:
            in_flight += 1
        try:
            pipeline.before_predict(max(in_flight, min(max_in_flight, demand())))
            return run(*args, **kwargs)
        finally:
            with lock:
                in_flight -= 1

    return counted


def at_full_load(pipeline: InferencePipeline, max_in_flight: int) -> Callable[[list[BaseModel]], object]:
    """A function that runs a batch as a busy worker does: `max_in_flight` times at once, in this and in new threads.

    It returns once all runs have ended, and raises what one of them raised.
    """
    if max_in_flight == 1:
        return pipeline.run_inference

    def run(items: list[BaseModel]) -> None:
        errors = list[Exception]()

        def run_one() -> None:
            try:
                pipeline.before_predict(max_in_flight)
                pipeline.run_inference(list(items))
            except BaseException as error:  # noqa: BLE001  # raised below, in the thread of the caller
                errors.append(as_exception(error))

        others = [Thread(target=run_one, daemon=True) for _ in range(max_in_flight - 1)]
        for thread in others:
            thread.start()
        run_one()
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]

    return run


def is_too_large(error: BaseException) -> bool:
    """Whether a batch failed for lack of memory, so that its parts may succeed.

    torch raises an error of its own for a GPU; its CPU allocator, cuBLAS and JAX raise a ``RuntimeError``. ONNX Runtime
    and TensorFlow have errors of their own for all that fails at run time.
    """
    error = lone_error(error)
    if isinstance(error, MemoryError | BatchTooLargeError):
        return True
    # torch is not imported here: a pipeline may not need it. While another thread imports it, the module is incomplete.
    out_of_memory: tuple[()] | type[Exception] = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    if isinstance(error, out_of_memory):
        return True
    is_framework_error = isinstance(error, RuntimeError) or type(error).__module__.startswith(_FRAMEWORKS)
    return is_framework_error and _OUT_OF_MEMORY.search(error_text(error)) is not None


def _checked_all(pipeline: InferencePipeline, outputs: Any) -> Outputs:
    # The scheduler refuses anything but a sequence of the right length.
    is_list = isinstance(outputs, Sequence) and not isinstance(outputs, str | bytes)
    return [_checked(pipeline, output) for output in outputs] if is_list else outputs


def _checked(pipeline: InferencePipeline, output: object) -> InferenceOutputModel | Exception:
    if isinstance(output, Exception):
        return RetryableError(output) if _is_transient(pipeline, output) else output
    if not isinstance(output, InferenceOutputModel):
        try:
            _ensure_awaited("the pipeline", output)
        except NotAwaitedError as error:
            return error
        return PipelineOutputError(output, pipeline.output_model)
    if output.status == "error":
        return RejectItem(output.error or "")
    return output if isinstance(output, pipeline.output_model) else _converted(output, pipeline.output_model)


def _converted(output: InferenceOutputModel, model: type[InferenceOutputModel]) -> InferenceOutputModel | Exception:
    """An output of another class as one of `model`, if its fields fit."""
    try:
        return validated(model, dict(output))
    except BaseException as error:  # noqa: BLE001  # a model's own validators may raise anything
        return PipelineOutputError(output, model, describe_error(users_error(error)))


@contextmanager
def _transient_errors(pipeline: InferencePipeline) -> Iterator[None]:
    """A block that runs the pipeline: raises `RetryableError` in place of what the pipeline declares transient."""
    try:
        yield
    except Exception as error:
        if _is_transient(pipeline, error):
            raise RetryableError(error) from error
        raise


def _is_transient(pipeline: InferencePipeline, error: BaseException) -> bool:
    """Whether the pipeline declares an error transient that is none of those which are treated in their own way."""
    error = lone_error(error)
    return (
        isinstance(error, pipeline.retryable_errors)
        and not isinstance(error, RejectItem)
        and not is_too_large(error)
        and not is_device_fault(error)
    )


def _ensure_awaited(source: str, result: Any) -> None:
    """Raise `NotAwaitedError` if a result is an awaitable, or a dictionary of some, or of lists of some."""
    # A list of outputs is left out, because each of them is checked alone.
    values = result.values() if isinstance(result, dict) else () if isinstance(result, list) else (result,)
    for value in values:
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, _AWAITABLES):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, CoroutineType):
                    one.close()  # else Python warns of it, much later
            raise NotAwaitedError(source, first)


def is_device_fault(error: BaseException) -> bool:
    """Whether no later batch of this process can succeed, because its CUDA context is lost; not for lack of memory."""
    error = lone_error(error)
    # torch has an error of its own for it since 2.8.
    accelerator_error: tuple[()] | type[Exception] = getattr(sys.modules.get("torch"), "AcceleratorError", ())
    text = error_text(error)
    is_fault = isinstance(error, accelerator_error) or (isinstance(error, RuntimeError) and _DEVICE_FAULT.search(text))
    return bool(is_fault) and not is_too_large(error) and _FAULT_OF_THE_CALL.search(text) is None
