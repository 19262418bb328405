"""An engine in this process, with faults that can be switched on: tests a program against what goes wrong elsewhere.

It promises what any engine does: a kept call runs until it has returned, again and again where its worker is lost, so
that a job runs at least once. What travels is copied as JSON, both ways.
"""

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self, cast

import anyio
from anyio import AsyncContextManagerMixin
from anyio.abc import TaskGroup
from pydantic_core import from_json, to_json

from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferencePipeline
from modalkit.service.calls.engine import CallOptions, CallResult, CallState, MemoryKeyValueStore
from modalkit.service.calls.jobs import CallGateway, CallJobs
from modalkit.service.calls.predictor import CallModel
from modalkit.service.calls.processor import Call, CallProcessor
from modalkit.service.calls.records import CallRecords
from modalkit.service.errors import ContainerFaultError, RemoteCallError, RemoteTimeoutError, describe_error
from modalkit.service.jobs import JobStoreError, MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.settings import AppSettings, Settings
from modalkit.service.worker import InferenceWorker

Run = Callable[[Sequence[Any], Call], Awaitable[Sequence[Mapping[str, Any]]]]


class WorkerLostError(BaseException):
    """Raise it from a pipeline's stand-in or a `Run`, to end the worker as the death of its process does."""


@dataclass(slots=True)
class Faults:
    """What goes wrong. A number counts down to 0 as it happens; everything else holds until it is set back."""

    workers_lost_before_a_run: int = 0
    """For so many runs, the worker is lost before it has the call. The call runs again."""
    workers_lost_after_a_run: int = 0
    """For so many runs, the worker is lost after it ran the call, with the outcomes. The call runs again."""
    duplicated_runs: int = 0
    """So many calls run a second time after they have returned. The outcomes of the second run are ignored."""
    refuses_calls: bool = False
    """No call is taken."""
    is_unreachable: bool = False
    """The calls that are kept cannot be asked for or cancelled."""
    store_is_unreachable: bool = False
    """The key-value store raises `JobStoreError`."""
    store_delay_s: float = 0.0
    """Seconds that each operation of the key-value store takes."""


@dataclass(slots=True)
class InProcessCall:
    """A call that the engine has taken."""

    model_name: str
    entries: Sequence[Any]
    options: CallOptions
    is_kept: bool
    result: CallResult = field(default_factory=lambda: CallResult(CallState.PENDING))
    error: Exception | None = None
    """What it failed with."""
    runs: int = 0
    ended: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope | None = None
    """Of its run, while it runs."""

    def end(self, result: CallResult, error: Exception | None = None) -> None:
        """Give it a result, unless it has one."""
        if not self.ended.is_set():
            self.result, self.error = result, error
            self.ended.set()


class InProcessEngine(AsyncContextManagerMixin):
    """Runs calls in tasks of this process: a `CallClient`, a `CallQueue`, and a key-value store (`store`).

    An async context manager; leaving it ends what runs. `attach` says what runs the calls of a model. A call may take
    `timeout_s` seconds, and runs again `retries` times where it raised.
    """

    def __init__(self, *, faults: Faults | None = None, timeout_s: float = 300.0, retries: int = 0) -> None:
        self.faults = faults or Faults()
        self.store = _FaultyStore(self.faults)
        self.calls: dict[str, InProcessCall] = {}
        """All calls so far, by their ids; changed by the engine."""
        self._timeout_s = timeout_s
        self.retries = retries
        self._runs: dict[str, Run] = {}
        self._ids = map("call-{:06d}".format, itertools.count())
        self._may_take = anyio.Event()
        self._may_take.set()
        self._task_group: TaskGroup | None = None

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with plain_task_group() as self._task_group:
            yield self
            self._task_group.cancel_scope.cancel()

    def attach(self, model_name: str, run: Run) -> None:
        """Have the calls of a model run by `run`, as `CallProcessor.process`."""
        self._runs[model_name] = run

    def hold(self) -> None:
        """Take no call until `release`: who makes one waits, as with a slow network."""
        self._may_take = anyio.Event()

    def release(self) -> None:
        """End `hold`."""
        self._may_take.set()

    def lose_worker(self) -> None:
        """Cancel all that runs, as a lost worker does; its calls run again."""
        for call in self.calls.values():
            if call.scope is not None:
                call.scope.cancel()

    def forget_results(self) -> None:
        """Let the results of all calls that have ended expire."""
        for call in self.calls.values():
            if call.ended.is_set():
                call.result = CallResult(CallState.FORGOTTEN, error="its result is no longer kept")

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        """Run a call and wait for it. Raises `RemoteCallError` and `ContainerFaultError`."""
        _, call = await self._take(model_name, entries, options, is_kept=False)
        await call.ended.wait()
        match call.result.state:
            case CallState.RETURNED:
                return call.result.outcomes
            case CallState.TIMED_OUT:
                raise RemoteTimeoutError(f"the call took longer than {self._timeout_s:g} s")
        if isinstance(call.error, ContainerFaultError):
            raise call.error
        raise RemoteCallError(f"the call failed: {call.result.error}")

    async def enqueue(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> str:
        """Keep a call and have it run; returns its id. Raises `RemoteCallError`."""
        call_id, _ = await self._take(model_name, entries, options, is_kept=True)
        return call_id

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """The state of a call, once it has ended or `wait_s` seconds have passed. Raises `RemoteCallError`."""
        self._check_reachable()
        call = self.calls.get(call_id)
        if call is None or not call.is_kept:
            return CallResult(CallState.UNKNOWN)
        with anyio.move_on_after(wait_s):
            await call.ended.wait()
        return call.result

    async def cancel(self, call_id: str) -> None:
        """End a call that has not ended. Raises `RemoteCallError`."""
        self._check_reachable()
        call = self.calls[call_id]
        call.end(CallResult(CallState.CANCELLED, error="it was cancelled"))
        if call.scope is not None:
            call.scope.cancel()

    def _check_reachable(self) -> None:
        if self.faults.is_unreachable:
            raise RemoteCallError("the engine could not be asked: it is unreachable")

    async def _take(
        self, model_name: str, entries: Sequence[Any], options: CallOptions, *, is_kept: bool
    ) -> tuple[str, InProcessCall]:
        await self._may_take.wait()
        if self.faults.refuses_calls:
            raise RemoteCallError("the engine did not accept the call: it refuses calls")
        if self._task_group is None:
            raise RuntimeError("an InProcessEngine is used inside its 'async with' block")
        call_id, call = next(self._ids), InProcessCall(model_name, _copied(entries), options, is_kept)
        self.calls[call_id] = call
        self._task_group.start_soon(self._run_to_its_end, call_id, call)
        return call_id, call

    async def _run_to_its_end(self, call_id: str, call: InProcessCall) -> None:
        errors = 0
        while not call.ended.is_set():
            try:
                outcomes = await self._run(call_id, call)
            except Exception as error:  # noqa: BLE001  # it is what became of the call
                errors += 1
                if errors > self.retries:
                    call.end(CallResult(CallState.FAILED, error=describe_error(error)), error)
            else:
                if outcomes is not None:
                    call.end(CallResult(CallState.RETURNED, outcomes))
        if self.faults.duplicated_runs and call.result.state is CallState.RETURNED:
            self.faults.duplicated_runs -= 1
            with suppress(Exception):
                await self._run(call_id, call)

    async def _run(self, call_id: str, call: InProcessCall) -> Sequence[Mapping[str, Any]] | None:
        """Run a call once; None where its worker was lost, or it was ended."""
        call.runs += 1
        if self.faults.workers_lost_before_a_run:
            self.faults.workers_lost_before_a_run -= 1
            return None
        outcomes = None
        given = Call(
            call_id=call_id,
            until_s=anyio.current_time() + self._timeout_s,
            options=call.options,
            is_kept=call.is_kept,
        )
        with anyio.CancelScope() as call.scope, anyio.move_on_after(self._timeout_s) as limit:
            try:
                outcomes = await self._runs[call.model_name](call.entries, given)
            except* WorkerLostError:
                pass  # there are no outcomes
        if limit.cancelled_caught:
            call.end(CallResult(CallState.TIMED_OUT, error=f"it took longer than {self._timeout_s:g} s"))
        call.scope = None
        if outcomes is None:
            return None
        if self.faults.workers_lost_after_a_run:
            self.faults.workers_lost_after_a_run -= 1
            return None
        return cast("Sequence[Mapping[str, Any]]", _copied(outcomes))


class _FaultyStore(MemoryKeyValueStore):
    """A key-value store that is as slow and as unreachable as it is told."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    async def get(self, key: str) -> Any:
        await self._reach()
        return await super().get(key)

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        await self._reach()
        return await super().put(key, _copied(value), skip_if_exists=skip_if_exists)

    async def remove(self, key: str) -> None:
        await self._reach()
        await super().remove(key)

    async def _reach(self) -> None:
        await anyio.sleep(self._faults.store_delay_s)
        if self._faults.store_is_unreachable:
            raise JobStoreError("the key-value store is unreachable")


@asynccontextmanager
async def in_process_gateway(
    pipeline: InferencePipeline,
    engine: InProcessEngine,
    *,
    settings: Settings | None = None,
    queue_backend: QueueBackend | None = None,
) -> AsyncGenerator[CallGateway]:
    """A gateway whose one model is run by calls through `engine`, as on Modal, by a worker in this process.

    Its ``models`` predict, and its ``jobs`` are submitted, asked for and cancelled. Results of jobs go to
    `queue_backend`. The engine is opened and closed with it.
    """
    app = AppSettings() if settings is None else settings.for_model(pipeline.model_name).app_settings
    records = CallRecords(engine.store)
    rules = QueueRules(app.queue_config.allowed_queues, queue_backend)
    async with (
        JobManager(MemoryJobStore()) as manager,  # of the worker's own interface, which is not used
        InferenceWorker(pipeline, settings=settings, jobs=manager, calibrate=False) as worker,
    ):
        processor = CallProcessor(
            worker,
            app.async_config,
            queue_rules=rules,
            responses=queue_backend,
            records=records,
            retries=engine.retries,
        )
        model = CallModel(
            worker.model_name,
            engine,
            app.batch_config,
            input_model=worker.input_model,
            output_model=pipeline.output_model,
        )
        jobs = CallJobs(engine, records, {model.name: model}, queue_rules=rules, config=app.batch_config)
        engine.attach(worker.model_name, processor.process)
        async with CallGateway({model.name: model}, jobs, opens=[engine, model]) as gateway:
            yield gateway


def _copied(value: Any) -> Any:
    return from_json(to_json(value, inf_nan_mode="constants"))
