"""Runs batches for the scheduler: in threads, within the time limit, with stages that may overlap."""

import asyncio
import inspect
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from operator import is_
from time import perf_counter
from typing import Any, Generic, NamedTuple, TypeVar, cast

import anyio

from modalkit.batching.errors import (
    BatchTimeoutError,
    InputsMovedError,
    OutputCountError,
    SchedulerClosedError,
    as_exception,
    users_error,
)
from modalkit.batching.stages import RunBatch, Stages, StageSeconds
from modalkit.batching.task_groups import await_users_code
from modalkit.batching.threads import DedicatedThread

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

LONG_VISIT_S = 0.002
"""Seconds of synchronous batches after which a visit to the thread begins no more: it was expected to take far less."""

Ended = tuple[Sequence[R | Exception], StageSeconds]
"""The outputs of a batch, and its seconds."""


class BatchDeferredError(Exception):
    """Raised for a batch that did not run: another one should run first, or its device is not ready."""


class BatchDisturbedError(Exception):
    """Raised for a batch that failed when its device ceased to be ready, while others ran there: one may be the cause.

    Its `error` is what the batch raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Progress:
    """How far an overlapped batch has come. If `should_preempt` is true before its second stage, it is preempted."""

    def __init__(self, should_preempt: Callable[[], bool]) -> None:
        self.should_preempt = should_preempt
        self.predict_started = anyio.Event()
        self.predict_ended = anyio.Event()

    def end(self) -> None:
        """Record that the batch has ended, successfully or not."""
        self.predict_started.set()
        self.predict_ended.set()


class Preparation(NamedTuple):
    """How a device gets ready to run batches, where it may cease to be."""

    is_needed: Callable[[], bool]
    """Asked in the event loop before each batch, and after one that failed."""
    run: Callable[[], object]
    """Called in a thread where it is needed, while other devices run the batches. It is called again if it raises, so
    it should wait a while first."""
    on_ready: Callable[[], object] = lambda: None
    """Called in the event loop after each `run` that succeeded: the first batches on the device may be slow again."""


class DeviceUse:
    """Who uses a device that can cease to be ready: batches at once, or one alone, which no other one can then harm.

    Whoever comes first goes first: a batch that comes after one that waits to be alone waits for it.
    """

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self._entrance = anyio.Lock(fast_acquire=True)
        self._users = self._entered = 0
        self._is_free = anyio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncGenerator[Callable[[], bool]]:
        """Use the device beside others; yields what says whether no other one has used it since then."""
        async with self._entrance:
            self._users += 1
            self._entered += 1
            was_free, entered = self._users == 1, self._entered
        try:
            yield lambda: was_free and self._entered == entered
        finally:
            self._users -= 1
            if not self._users:
                self._is_free.set()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Use the device while no other one does."""
        async with self._entrance:
            if self._users:
                self._is_free = anyio.Event()
                await self._is_free.wait()
            yield


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
        use: DeviceUse | None = None,
        rank: int = 0,
    ) -> None:
        self._name = name
        self._use = use
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
        # Only overlapped batches ever wait for these locks. They are fair: first come, first served.
        self._main_lock = anyio.Lock(fast_acquire=True)
        self._side_lock = anyio.Lock(fast_acquire=True)
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
    def stuck_threads(self) -> int:
        """How many calls ran past the time limit and have not returned."""
        return self._main.stuck + self._side.stuck

    def wait_for_stuck(self, until_s: float) -> None:
        """Wait, in any thread, until no call that was given up runs any more, or until `until_s` (`time.monotonic`)."""
        self._main.wait_for_stuck(until_s)
        self._side.wait_for_stuck(until_s)

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
        await self._run_in_time([payloads], ended)
        return ended[0][0]

    async def run_while_paused(self, function: Callable[[], S], timeout_s: float | None) -> S:
        """Run a function in the main thread, in a block of `paused`."""
        self._ensure_open()
        with anyio.fail_after(timeout_s):
            return await self._main.run(function)

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise SchedulerClosedError("the scheduler closed before this could run")

    @property
    def must_prepare(self) -> bool:
        """Whether the device has to be prepared before it can run a batch."""
        return self._use is not None and self._use.preparation.is_needed()

    async def prepare(self) -> None:
        """Prepare the device, unless it is ready. An error is logged."""
        if self._use is not None:
            async with self._alone(self._use, None):
                pass

    @asynccontextmanager
    async def _alone(self, use: DeviceUse, timeout_s: float | None) -> AsyncGenerator[bool]:
        """Use the device while no other one does, once it is prepared; yields whether it is ready in that time.

        Without a time it is prepared once, else until it is ready or this executor is retired.
        """
        async with AsyncExitStack() as used:
            is_ready = False
            with anyio.move_on_after(timeout_s) as scope:
                await used.enter_async_context(use.alone())
                is_ready = await self._has_prepared(use)
                while not is_ready and timeout_s is not None and not self.is_retired:
                    is_ready = await self._has_prepared(use)
            if scope.cancelled_caught:
                logger.error("%s: device %d was not ready within %g s", self._name, self.device, timeout_s)
            yield is_ready

    async def _has_prepared(self, use: DeviceUse) -> bool:
        """Prepare the device, unless it is ready; returns whether it is. An error is logged."""
        try:
            if self.must_prepare:
                async with self._main_lock:
                    await self._main.run(use.preparation.run)
                use.preparation.on_ready()
        except Exception:
            logger.exception("%s: device %d cannot run batches now; trying again later", self._name, self.device)
            return False
        return True

    async def attempt(
        self, batches: Sequence[list[T]], progress: "Progress | None" = None
    ) -> list[Ended[R] | tuple[Exception, None]]:
        """Run batches one after the other, up to the first that fails: its error is then the last of the results.

        Synchronous batches run in one visit to the thread, in which the time limit is for all of them together. It ends
        early once they have taken `LONG_VISIT_S`: those that are left have no result. With a `progress`, there is one
        batch, and each stage of it runs as soon as the batch before has left it. Then only the time in the stages
        counts towards the time limit, not the time that the batch waits for other batches.

        The error is a `BatchDeferredError` for a batch that did not run, and a `BatchDisturbedError` for one that may
        have failed because of another one on its device.
        """
        if self._use is None:
            return await self._attempt(batches, progress)
        async with self._use.shared() as was_alone:
            if self.must_prepare:
                return [(BatchDeferredError(), None)]
            results = await self._attempt(batches, progress)
            outputs, _ = results[-1]
            is_deferred = isinstance(outputs, BatchDeferredError)
            if isinstance(outputs, Exception) and not is_deferred and self.must_prepare and not was_alone():
                results[-1] = BatchDisturbedError(outputs), None
            return results

    async def attempt_alone(self, payloads: list[T], max_prepare_s: float) -> Ended[R] | tuple[Exception, None]:
        """Run one batch while no other one uses its device, which is prepared if need be; returns as `attempt`.

        The error is a `BatchDeferredError` if the device is not ready within `max_prepare_s` and the time that another
        batch may take, or this executor is retired by then.
        """
        # Others that use the device may take as long as a batch may.
        wait_s = max_prepare_s + (0.0 if math.isinf(self._timeout_s) else self._timeout_s)
        async with nullcontext(True) if self._use is None else self._alone(self._use, wait_s) as is_ready:
            if not is_ready or self.is_retired:
                return BatchDeferredError(), None
            [result] = await self._attempt([payloads], None)
            return result

    async def _attempt(
        self, batches: Sequence[list[T]], progress: "Progress | None"
    ) -> list[Ended[R] | tuple[Exception, None]]:
        """As `attempt`, whoever else uses the device."""
        ended: list[Ended[R]] = []
        try:
            if progress is not None and self.stages is not None:
                [payloads] = batches
                ended.append(await self._run_overlapped(payloads, self.stages, progress))
            else:
                # All stages run at once, so no other batch may be in any of them.
                async with nullcontext() if self.stages is None else self._side_lock, self._main_lock:
                    await self._run_in_time(batches, ended)
        except Exception as error:  # noqa: BLE001  # user code may raise anything; the items get it as their error
            # It is returned, so that no frame of its traceback refers to the requests that will refer to it.
            return [*ended, (error, None)]
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or not self.is_async or not _has_cancelled_itself():
                raise
            while task.uncancel():
                pass
            return [*ended, (as_exception(error), None)]
        return [*ended]

    async def _run_in_time(self, batches: Sequence[list[T]], ended: list[Ended[R]]) -> None:
        """Run batches, and add those that have ended to `ended`; raises what the first that fails raises."""
        waiting, done = iter(batches), list[Ended[R]]()
        try:
            with nullcontext() if math.isinf(self._timeout_s) else anyio.move_on_after(self._timeout_s):
                await self._run_at_once(waiting, done)
                return
        finally:
            deque(waiting, maxlen=0)  # an abandoned thread begins no further batch
            ended += done  # and what it may still add to `done` is dropped
        if (count := len(ended)) < len(batches):
            raise BatchTimeoutError(self._timeout_s, len(batches[count]))

    async def _run_at_once(self, batches: Iterator[list[T]], ended: list[Ended[R]]) -> None:
        """As `_run_in_time`, without a time limit."""
        if self.is_async:
            for payloads in batches:
                outputs, seconds = await self._run_in_loop(payloads)
                ended.append((checked_outputs(outputs, len(payloads)), seconds))
        else:
            await self._main.run(partial(_run_synchronously, self._run_batch, batches, ended))

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
        async with self._main_lock:
            if progress.should_preempt():
                raise BatchDeferredError
            progress.predict_started.set()
            raw, predict_s = await self._run_stage(self._main, left_s, stages.predict, payloads, prepared)
        progress.predict_ended.set()
        left_s -= predict_s
        async with self._side_lock:
            outputs, postprocess_s = await self._run_stage(self._side, left_s, stages.postprocess, payloads, raw)
        return checked_outputs(outputs, len(payloads)), StageSeconds(preprocess_s, predict_s, postprocess_s)

    async def _run_stage(
        self, thread: DedicatedThread, left_s: float, stage: Callable[..., S], payloads: list[T], *more: Any
    ) -> tuple[S, float]:
        with anyio.move_on_after(max(0.0, left_s)):
            return await _call(thread, stage, payloads, *more)
        raise BatchTimeoutError(self._timeout_s, len(payloads))


def _has_cancelled_itself() -> bool:
    """Whether code that runs in this task of a task group cancelled it: no cancel scope did, and its host task goes on.

    At the end of `asyncio.run` all tasks are cancelled. A host task that left its task group open has ended by then.
    """
    if anyio.current_effective_deadline() == -math.inf:
        return False
    host_id = anyio.get_current_task().parent_id
    host = next((task for task in asyncio.all_tasks() if id(task) == host_id), None)
    return host is not None and not host.cancelling()


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
    result = await await_users_code(stage(given, *more))
    ensure_order(payloads, given)
    return result, perf_counter() - started_s


def _run_synchronously(run_batch: RunBatch[T, R], batches: Iterator[list[T]], ended: list[Ended[R]]) -> None:
    long_s = perf_counter() + LONG_VISIT_S
    for payloads in batches:
        outputs, seconds = _run_stages(run_batch, payloads)
        ended.append((checked_outputs(outputs, len(payloads)), seconds))
        if perf_counter() >= long_s:
            return


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
    try:
        listed = list(outputs)  # a user's sequence may be lazy or report a wrong length
    except Exception:
        raise
    except BaseException as error:
        raise users_error(error) from error
    if len(listed) != count:
        raise OutputCountError(count, f"{len(listed)} outputs")
    return listed
