"""Runs batches on behalf of the scheduler: in threads, within the time limit, with stages that may overlap."""

import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from operator import is_
from time import perf_counter
from typing import Any, Generic, TypeVar, cast

import anyio

from modalkit.batching.errors import (
    BatchTimeoutError,
    InputsMovedError,
    OutputCountError,
    SchedulerClosedError,
    text_of,
)
from modalkit.batching.stages import RunBatch, Stages, StageSeconds
from modalkit.batching.task_groups import without_foreign_cancellation
from modalkit.batching.threads import DedicatedThread

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


class BatchYieldedError(Exception):
    """Raised for an overlapped batch that has not been predicted, because another one is to go first."""


class Progress:
    """How far an overlapped batch has come; where `yields` says so before it is predicted, it comes no further."""

    def __init__(self, yields: Callable[[], bool] = lambda: False) -> None:
        self.yields = yields
        self.predict_started = anyio.Event()
        self.predict_ended = anyio.Event()

    def end(self) -> None:
        """It will come no further, whether it succeeded or not."""
        self.predict_started.set()
        self.predict_ended.set()


class Executor(Generic[T, R]):
    """Runs one batch at a time, or the stages of neighbours at the same time.

    Synchronous functions run in a thread of its own, the first and last stages of overlapped batches in a second one. A
    call raises whatever the function raised (a `RuntimeError` for what is no `Exception`, such as `SystemExit`),
    `BatchTimeoutError` when its stages took longer than `timeout_s` together, and `OutputCountError` for anything but
    one output for each payload. Cancelling a call abandons a function that runs in a thread; the next call gets a new
    thread.

    Each stage gets a list of its own, so that what it does to it changes nothing for the next one. Where it removes
    payloads or changes their order, a batch of several fails with `InputsMovedError`: which output is whose is unknown.
    """

    def __init__(self, run_batch: RunBatch[T, R], timeout_s: float, name: str) -> None:
        self._stages = run_batch if isinstance(run_batch, Stages) else None
        self._function = None if isinstance(run_batch, Stages) else run_batch
        self.is_async = inspect.iscoroutinefunction(run_batch) or inspect.iscoroutinefunction(
            getattr(run_batch, "__call__", None)  # noqa: B004  # not whether it can be called, but how
        )
        self._timeout_s = timeout_s
        self._main = DedicatedThread(name)
        self._side = DedicatedThread(f"{name} stages")
        # Only overlapped batches ever wait for these. They are fair: whoever asks first goes first.
        self._main_lock = anyio.Lock(fast_acquire=True)
        self._side_lock = anyio.Lock(fast_acquire=True)
        self._is_closed = False

    @property
    def has_stages(self) -> bool:
        """Whether batches can overlap."""
        return self._stages is not None

    @property
    def is_busy(self) -> bool:
        """Whether a batch is running, or waiting to run."""
        return self._main_lock.locked() or self._side_lock.locked()

    @property
    def stuck_threads(self) -> int:
        """How many calls ran past the time limit and have still not come back."""
        return self._main.stuck + self._side.stuck

    def close(self) -> None:
        """Let the threads end after their current calls."""
        self._is_closed = True
        self._main.close()
        self._side.close()

    async def run_in_thread(self, function: Callable[[], S], timeout_s: float | None) -> S:
        """Run a function where batches run, while none of them is in any stage."""
        async with self._side_lock, self._main_lock:
            if self._is_closed:
                raise SchedulerClosedError("the scheduler closed before this function could run")
            with anyio.fail_after(timeout_s):
                return await self._main.run(function)

    async def run(
        self, payloads: list[T], progress: "Progress | None" = None
    ) -> tuple[Sequence[R | Exception], StageSeconds]:
        """Run a batch, all its stages in one visit to the thread.

        With a `progress`, run it stage by stage, each as soon as the batch before has left it; then only the time in
        the stages counts for the time limit, not what is spent waiting for other batches.
        """
        if progress is not None and self._stages is not None:
            outputs, seconds = await self._run_overlapped(payloads, self._stages, progress)
        elif self._stages is not None:
            async with self._side_lock:  # all stages run in one piece, so no other batch may be in any of them
                outputs, seconds = await self._run_in_time(payloads)
        else:
            outputs, seconds = await self._run_in_time(payloads)
        return _checked(outputs, len(payloads)), seconds

    async def attempt(
        self, payloads: list[T], progress: "Progress | None" = None
    ) -> tuple[Sequence[R | Exception] | Exception, StageSeconds | None]:
        """Run a batch and return the error, if any, in place of the outputs.

        Like this no frame in the error's traceback holds the requests that will hold the error.
        """
        try:
            return await self.run(payloads, progress)
        except Exception as error:  # noqa: BLE001  # user code may raise anything; it becomes the items' error
            return error, None
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            exit_error = RuntimeError(f"the batch raised {text_of(error)}")
            exit_error.__cause__ = error
            return exit_error, None

    async def _run_in_time(self, payloads: list[T]) -> tuple[Any, StageSeconds]:
        async with self._main_lock:
            if math.isinf(self._timeout_s):
                return await self._call(payloads)
            with anyio.move_on_after(self._timeout_s):
                return await self._call(payloads)
            raise BatchTimeoutError(self._timeout_s, len(payloads))

    async def _run_overlapped(
        self, payloads: list[T], stages: Stages[T, R], progress: "Progress"
    ) -> tuple[Any, StageSeconds]:
        left_s, count = self._timeout_s, len(payloads)
        async with self._side_lock:
            prepared, preprocess_s = await self._timed(
                self._side, lambda: _on_copy(stages.preprocess, payloads), left_s, count
            )
        left_s -= preprocess_s
        async with self._main_lock:
            if progress.yields():
                raise BatchYieldedError
            progress.predict_started.set()
            raw, predict_s = await self._timed(
                self._main, lambda: _on_copy(stages.predict, payloads, prepared), left_s, count
            )
        progress.predict_ended.set()
        left_s -= predict_s
        async with self._side_lock:
            outputs, postprocess_s = await self._timed(
                self._side, lambda: _on_copy(stages.postprocess, payloads, raw), left_s, count
            )
        return outputs, StageSeconds(preprocess_s, predict_s, postprocess_s)

    async def _call(self, payloads: list[T]) -> tuple[Any, StageSeconds]:
        """Call the function, or all stages in a row, without a time limit."""
        if self._stages is not None:
            stages = self._stages
            return await self._main.run(lambda: _all_stages(stages, payloads))
        if self.is_async:
            started_s = perf_counter()  # the event loop's own clock may tell but milliseconds
            given = list(payloads)
            outputs = await without_foreign_cancellation(cast("Awaitable[Any]", cast("Any", self._function)(given)))
            _ensure_places(payloads, given)
            return outputs, StageSeconds(0.0, perf_counter() - started_s, 0.0)
        function = cast("Callable[[list[T]], Any]", self._function)
        outputs, seconds = await self._main.run(lambda: _timed_call(lambda: _on_copy(function, payloads)))
        return outputs, StageSeconds(0.0, seconds, 0.0)

    async def _timed(
        self, thread: DedicatedThread, stage: Callable[[], S], left_s: float, count: int
    ) -> tuple[S, float]:
        with anyio.move_on_after(max(0.0, left_s)):
            return await thread.run(lambda: _timed_call(stage))
        raise BatchTimeoutError(self._timeout_s, count)


def run_checked(run_batch: RunBatch[T, R], payloads: list[T]) -> Sequence[R | Exception]:
    """Run a synchronous batch in this thread, outside any scheduler.

    Raises what it raises, and `InputsMovedError` and `OutputCountError` as an `Executor` does.
    """
    if isinstance(run_batch, Stages):
        outputs, _ = _all_stages(run_batch, payloads)
    else:
        outputs = _on_copy(cast("Callable[[list[T]], Any]", run_batch), payloads)
    return _checked(outputs, len(payloads))


def _all_stages(stages: Stages[T, R], payloads: list[T]) -> tuple[Any, StageSeconds]:
    prepared, preprocess_s = _timed_call(lambda: _on_copy(stages.preprocess, payloads))
    raw, predict_s = _timed_call(lambda: _on_copy(stages.predict, payloads, prepared))
    outputs, postprocess_s = _timed_call(lambda: _on_copy(stages.postprocess, payloads, raw))
    return outputs, StageSeconds(preprocess_s, predict_s, postprocess_s)


def _on_copy(stage: Callable[..., S], payloads: list[T], *more: Any) -> S:
    given = list(payloads)
    result = stage(given, *more)
    _ensure_places(payloads, given)
    return result


def _ensure_places(payloads: list[T], given: list[T]) -> None:
    """Raise `InputsMovedError` unless each payload is in its place of the list, or replaced there.

    Of a single one there is nothing to mix up.
    """
    if len(payloads) == 1 or (len(given) == len(payloads) and all(map(is_, given, payloads))):
        return
    known = set(map(id, payloads))
    kept = zip(given, payloads, strict=False)  # what is appended, to fill a batch up, moves no other
    if len(given) < len(payloads) or any(found is not sent and id(found) in known for found, sent in kept):
        logger.warning("A batch runs one by one: run_batch, or a stage, removed inputs from its list or moved them")
        raise InputsMovedError


def _timed_call(function: Callable[[], S]) -> tuple[S, float]:
    started_s = perf_counter()
    result = function()
    return result, perf_counter() - started_s


def _checked(outputs: Any, count: int) -> list[Any]:
    if not isinstance(outputs, Sequence) or isinstance(outputs, str | bytes):
        raise OutputCountError(count, f"{type(outputs).__name__}")
    listed = list(outputs)  # a sequence of the user's own may be lazy, or lie about its length: this one does neither
    if len(listed) != count:
        raise OutputCountError(count, f"{len(listed)}")
    return listed
