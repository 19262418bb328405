"""Runs batches for the scheduler: in threads, within the time limit, with stages that may overlap."""

import inspect
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
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
from modalkit.batching.threads import Call, DedicatedThread

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

LONG_VISIT_S = 0.002
"""Seconds of synchronous batches after which a visit to the thread begins no more: it was expected to take far less."""

Ended = tuple[Sequence[R | Exception], StageSeconds]
"""The outputs of a batch, and its seconds."""


class BatchPreemptedError(Exception):
    """Raised for an overlapped batch before its second stage, because another batch should run first."""


class Progress:
    """How far a batch has come beside which the next one may start.

    If `should_preempt` is true when it would begin, it is preempted; one that `overlaps`, when its second stage would.
    """

    def __init__(self, should_preempt: Callable[[], bool], *, overlaps: bool) -> None:
        self._should_preempt = should_preempt
        self._is_preempted = False
        self.overlaps = overlaps
        """Whether its stages overlap with those of the batches before and after it."""
        self.started = anyio.Event()
        """Set when it has begun, or its second stage."""
        self.computed = anyio.Event()
        """Set when its second stage has ended."""
        self.ended = anyio.Event()
        """Set when it has ended, and its callers have their outcomes."""

    @property
    def is_preempted(self) -> bool:
        """Whether it must not begin: asked in its thread, when that would begin it."""
        return self._is_preempted or self._should_preempt()

    def start(self) -> None:
        """Record that it has its turn. What the event loop takes out of the queue from now on preempts it no more."""
        self._is_preempted = self.is_preempted
        self.started.set()

    def end(self) -> None:
        """Record that the batch has ended, successfully or not."""
        self.started.set()
        self.computed.set()
        self.ended.set()


class Executor(Generic[T, R]):
    """Runs one batch at a time, or different stages of consecutive batches at the same time.

    Synchronous functions run in the executor's thread, asynchronous ones in the event loop. The first and last stages
    of overlapped batches run in a second thread. A call raises what the function raised (`RuntimeError` for an error
    that is no `Exception`, such as `SystemExit`), `BatchTimeoutError` if its stages took longer than `timeout_s`
    together, and `OutputCountError` if there is not exactly one output for each payload. When a call is cancelled, a
    function in a thread is abandoned there, and the next call gets a new thread.

    Each stage gets its own copy of the list, so that a stage cannot change the list of the next one. If a stage removes
    payloads or changes their order, a batch of several fails with `InputsMovedError`, because it is unknown which
    output belongs to which payload.
    """

    def __init__(
        self,
        run_batch: RunBatch[T, R],
        timeout_s: float,
        name: str,
        device: int = 0,
        before_batch: Callable[[], object] | None = None,
        rank: int = 0,
    ) -> None:
        self._before_batch = before_batch
        self.rank = rank
        """Of the executors of a device: one of a lower rank, if it is idle, runs a batch rather than this one."""
        self.device = device
        """The index of the device that its batches run on."""
        self._run_batch = run_batch
        self.stages = run_batch if isinstance(run_batch, Stages) else None
        """The stages by which batches can overlap."""
        self.is_async = (
            _is_async(run_batch)
            if self.stages is None
            else any(map(_is_async, (self.stages.preprocess, self.stages.predict, self.stages.postprocess)))
        )
        self._timeout_s = timeout_s
        self._main = DedicatedThread(name)
        self._side = DedicatedThread(f"{name} stages")
        # Only batches that start while others run ever wait for these locks. They are fair: first come, first served.
        self._main_lock = anyio.Lock(fast_acquire=True)
        self._side_lock = anyio.Lock(fast_acquire=True)
        self._overlapped = 0  # batches under way
        self._is_closed = False
        self.is_retired = False
        """Whether it is to begin no more batches, because others have taken its place."""
        self.has_ended = anyio.Event()
        """Set once it begins no more batches."""

    @property
    def is_busy(self) -> bool:
        """Whether a batch runs, or waits to run."""
        return self._main_lock.locked() or self._side_lock.locked()

    @property
    def takes_next(self) -> bool:
        """Whether a batch can be given to the thread while one runs there: nothing else waits for its turn."""
        return not (
            self.is_async
            or self._before_batch is not None
            or self._overlapped
            or self._side_lock.statistics().tasks_waiting
            or self._main_lock.statistics().tasks_waiting
        )

    @property
    def stuck_threads(self) -> int:
        """How many calls ran past the time limit and have not returned."""
        return self._main.stuck + self._side.stuck

    def close(self) -> None:
        """End the threads after their current calls."""
        self._is_closed = True
        self._main.close()
        self._side.close()

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[None]:
        """Wait until no batch is in any stage, and let none start in the block."""
        async with self._side_lock, self._main_lock:
            yield

    async def run_batch_while_paused(self, payloads: list[T]) -> Sequence[R | Exception]:
        """Run one batch, in a block of `paused`; raises what it raises."""
        self._ensure_open()
        ended: list[Ended[R]] = []
        await self._run_in_time(_Visit(self._run_batch, [payloads]), ended)
        return ended[0][0]

    async def run_while_paused(self, function: Callable[[], S], timeout_s: float | None) -> S:
        """Run a function in the main thread, in a block of `paused`."""
        self._ensure_open()
        with anyio.fail_after(timeout_s):
            return await self._main.run(function)

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise SchedulerClosedError("the scheduler closed before this could run")

    async def prepare(self) -> None:
        """Call `before_batch` in the main thread, without a time limit. Raises what it raises."""
        if self._before_batch is not None:
            async with self._main_lock:
                await self._main.run(self._before_batch)

    async def attempt(
        self, batches: Sequence[list[T]], progress: "Progress | None" = None
    ) -> list[Ended[R] | tuple[Exception, None]]:
        """Run batches one after the other, up to the first that fails: its error is then the last of the results.

        Synchronous batches run in one visit to the thread, in which the time limit is for all of them together. It ends
        early once they have taken `LONG_VISIT_S`: those that are left have no result. With a `progress`, there is one
        batch, which the thread begins as soon as the one before has ended, if it `takes_next`; or each stage of it, if
        it overlaps. The time that it waits for other batches does not count towards the time limit.
        """
        ended: list[Ended[R]] = []
        try:
            await self.prepare()
            if progress is not None and progress.overlaps and self.stages is not None:
                [payloads] = batches
                self._overlapped += 1
                try:
                    ended.append(await self._run_overlapped(payloads, self.stages, progress))
                finally:
                    self._overlapped -= 1
            else:
                await self._run_in_turn(batches, ended, progress)
        except Exception as error:  # noqa: BLE001  # user code may raise anything; the items get it as their error
            # It is returned, so that no frame of its traceback refers to the requests that will refer to it.
            return [*ended, (error, None)]
        return [*ended]

    async def _run_in_turn(self, batches: Sequence[list[T]], ended: list[Ended[R]], progress: Progress | None) -> None:
        """As `_run_in_time`, once the batch before has ended; in the thread, without waiting for the event loop."""
        visit = _Visit(self._run_batch, batches, progress)
        call = self._main.start(visit) if progress is not None and self.takes_next else None
        try:
            # All stages run at once, so no other batch may be in any of them.
            async with nullcontext() if self.stages is None else self._side_lock, self._main_lock:
                if progress is not None:
                    progress.start()
                await self._run_in_time(visit, ended, call)
        finally:
            visit.stop()

    async def _run_in_time(self, visit: "_Visit[T, R]", ended: list[Ended[R]], call: Call[None] | None = None) -> None:
        """Run batches, and add those that have ended to `ended`; raises what the first that fails raises."""
        try:
            with nullcontext() if math.isinf(self._timeout_s) else anyio.move_on_after(self._timeout_s):
                if self.is_async:
                    for payloads in visit.waiting:
                        outputs, seconds = await self._run_in_loop(payloads)
                        visit.ended.append((checked_outputs(outputs, len(payloads)), seconds))
                else:
                    await self._main.result_of(call or self._main.start(visit))
                return
        finally:
            ended += visit.stop()
        if (count := len(ended)) < len(visit.batches):
            raise BatchTimeoutError(self._timeout_s, len(visit.batches[count]))

    async def _run_in_loop(self, payloads: list[T]) -> tuple[Any, StageSeconds]:
        """Call the function, or all stages in a row, of which some are asynchronous."""
        if self.stages is None:
            outputs, seconds = await _call(self._main, cast("Callable[..., Any]", self._run_batch), payloads)
            return outputs, StageSeconds(0.0, seconds, 0.0)
        prepared, preprocess_s = await _call(self._main, self.stages.preprocess, payloads)
        raw, predict_s = await _call(self._main, self.stages.predict, payloads, prepared)
        outputs, postprocess_s = await _call(self._main, self.stages.postprocess, payloads, raw)
        return outputs, StageSeconds(preprocess_s, predict_s, postprocess_s)

    async def _run_overlapped(self, payloads: list[T], stages: Stages[T, R], progress: "Progress") -> Ended[R]:
        left_s = self._timeout_s
        async with self._side_lock:
            prepared, preprocess_s = await self._run_stage(self._side, left_s, stages.preprocess, payloads)
        left_s -= preprocess_s
        predict: Call[tuple[Any, float]] | None = None
        if not _is_async(stages.predict) and not self._main_lock.statistics().tasks_waiting:
            # The thread begins it as soon as the batch before has left it, without waiting for the event loop.
            predict = self._main.start(partial(_timed_unless_preempted, progress, stages.predict, payloads, prepared))
        async with self._main_lock:
            progress.start()
            if predict is None and progress.is_preempted:
                raise BatchPreemptedError
            raw, predict_s = await self._run_stage(self._main, left_s, stages.predict, payloads, prepared, call=predict)
        progress.computed.set()
        left_s -= predict_s
        async with self._side_lock:
            outputs, postprocess_s = await self._run_stage(self._side, left_s, stages.postprocess, payloads, raw)
        return checked_outputs(outputs, len(payloads)), StageSeconds(preprocess_s, predict_s, postprocess_s)

    async def _run_stage(
        self,
        thread: DedicatedThread,
        left_s: float,
        stage: Callable[..., S],
        payloads: list[T],
        *more: Any,
        call: Call[tuple[S, float]] | None = None,
    ) -> tuple[S, float]:
        """Run a stage within `left_s`, or wait for the `call` of it that was started."""
        with anyio.move_on_after(max(0.0, left_s)):
            return await (_call(thread, stage, payloads, *more) if call is None else thread.result_of(call))
        raise BatchTimeoutError(self._timeout_s, len(payloads))


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # the method itself is needed, not whether there is one
    )


async def _call(thread: DedicatedThread, stage: Callable[..., Any], payloads: list[T], *more: Any) -> tuple[Any, float]:
    """As `_timed`, in the thread; an asynchronous stage in the event loop."""
    if not _is_async(stage):
        return await thread.run(partial(_timed, stage, payloads, *more))
    started_s = perf_counter()  # the event loop's clock may have a resolution of milliseconds only
    given = list(payloads)
    try:
        result = await without_foreign_cancellation(stage(given, *more))
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise RuntimeError(f"the batch raised {text_of(error)}") from error
    ensure_order(payloads, given)
    return result, perf_counter() - started_s


class _Visit(Generic[T, R]):
    """Batches that run one after the other in one visit to the thread, up to the first that fails."""

    def __init__(self, run_batch: RunBatch[T, R], batches: Sequence[list[T]], progress: Progress | None = None) -> None:
        self.batches = batches
        self.waiting = iter(batches)
        self.ended: list[Ended[R]] = []
        self._run_batch = run_batch
        self._progress = progress

    def __call__(self) -> None:
        """What the thread does. Raises `BatchPreemptedError`, and what a batch raises."""
        if self._progress is not None and self._progress.is_preempted:
            raise BatchPreemptedError
        long_s = perf_counter() + LONG_VISIT_S
        for payloads in self.waiting:
            outputs, seconds = _run_stages(self._run_batch, payloads)
            self.ended.append((checked_outputs(outputs, len(payloads)), seconds))
            if perf_counter() >= long_s:
                return

    def stop(self) -> list[Ended[R]]:
        """Let an abandoned thread begin no further batch; returns those that have ended, once."""
        deque(self.waiting, maxlen=0)
        ended, self.ended = self.ended, []  # what the thread may still add is dropped
        return ended


def _run_stages(run_batch: RunBatch[T, R], payloads: list[T]) -> tuple[Any, StageSeconds]:
    if not isinstance(run_batch, Stages):
        outputs, seconds = _timed(run_batch, payloads)
        return outputs, StageSeconds(0.0, seconds, 0.0)
    prepared, preprocess_s = _timed(run_batch.preprocess, payloads)
    raw, predict_s = _timed(run_batch.predict, payloads, prepared)
    outputs, postprocess_s = _timed(run_batch.postprocess, payloads, raw)
    return outputs, StageSeconds(preprocess_s, predict_s, postprocess_s)


def _timed(stage: Callable[..., S], payloads: list[T], *more: Any) -> tuple[S, float]:
    """Call a stage with a copy of the list; returns its result and its seconds."""
    started_s = perf_counter()
    given = list(payloads)
    result = stage(given, *more)
    ensure_order(payloads, given)
    return result, perf_counter() - started_s


def _timed_unless_preempted(progress: Progress, stage: Callable[..., S], *args: Any) -> tuple[S, float]:
    """As `_timed`; raises `BatchPreemptedError`."""
    if progress.is_preempted:
        raise BatchPreemptedError
    return _timed(stage, *args)


def ensure_order(payloads: list[T], given: list[T]) -> None:
    """Raise `InputsMovedError` unless each payload is still at its index of the list, or was replaced there.

    A list of one payload is always accepted.
    """
    if len(payloads) == 1 or (len(given) == len(payloads) and all(map(is_, given, payloads))):
        return
    known = set(map(id, payloads))
    kept = zip(given, payloads, strict=False)  # appended items, such as padding of the batch, move no other
    if len(given) < len(payloads) or any(found is not sent and id(found) in known for found, sent in kept):
        logger.warning("A batch runs one by one, because it removed inputs from its list or moved them")
        raise InputsMovedError


def checked_outputs(outputs: Any, count: int) -> list[Any]:
    """The outputs as a list. Raises `OutputCountError` unless they are a sequence of `count`."""
    if not isinstance(outputs, Sequence) or isinstance(outputs, str | bytes):
        raise OutputCountError(count, f"an object of type {type(outputs).__name__}")
    listed = list(outputs)  # a user's sequence may be lazy or report a wrong length
    if len(listed) != count:
        raise OutputCountError(count, f"{len(listed)} outputs")
    return listed
