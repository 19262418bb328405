"""What runs inside a container: a worker with its upkeep, and what takes the container out of rotation."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import anyio
import modal
from anyio import to_thread

from modalkit.batching import BatchRecord
from modalkit.batching.errors import users_error
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferencePipeline
from modalkit.service.calls.engine import CallOptions, MemoryKeyValueStore
from modalkit.service.calls.processor import Call, CallProcessor
from modalkit.service.calls.records import CallRecords
from modalkit.service.errors import ContainerFaultError, Readiness, RemoteCallError, ServiceError, describe_error
from modalkit.service.jobs import MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import new_job_id
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.loading import ModelSource
from modalkit.service.logs import LogFormat, configure_logging
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.engine import open_metrics, open_records, takes_one_input_at_a_time
from modalkit.service.pipeline_batches import is_device_fault
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.serving import tune_interpreter
from modalkit.service.tracing import enable_tracing_from_environment
from modalkit.service.web.metrics import of_this_process, text_of
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

GRACE_S = 25.0
"""Seconds to finish what was accepted; Modal gives an exit hook 30."""
CALL_MARGIN_S = 5.0
"""Seconds before Modal's timeout at which a call returns by itself."""


def set_up_logs_and_traces() -> None:
    """In a container, log as JSON unless the program has handlers, and trace where variables name a collector."""
    if not modal.is_local():
        if not logging.getLogger().handlers:
            configure_logging(LogFormat.AUTO)
        enable_tracing_from_environment()


@contextmanager
def only_service_errors(what_failed: str) -> Iterator[None]:
    """Raise a `RemoteCallError` in place of an error that is no `ServiceError`.

    Around everything that Modal runs in a container. Modal's client raises an error that leaves a container again where
    the call was made; so a caller can tell it from the client's own errors by its class.
    """
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        raise RemoteCallError(f"{what_failed}: {describe_error(error)}") from error


class ContainerWorker(InferenceWorker):
    """The worker of a container, which is also the `Model` of the HTTP service in it."""

    def __init__(self, pipeline: InferencePipeline, source: ModelSource, **options: Any) -> None:
        super().__init__(pipeline, input_model=source.input_model, **options)
        self.output_model = source.output_model
        self.fault: str | None = None
        """Why this process can run no more batches."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model_name

    @property
    def problem(self) -> str | None:
        """Why it takes no requests, or should get none."""
        return self.fault or super().problem

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        return Readiness.BROKEN if self.is_broken else Readiness.READY


class Container:
    """Runs one pipeline. Started in one Modal hook and stopped in another; needs no Modal in any other program.

    Results of jobs go to `responses`, if there is one; `backend` says which names its queues may have. `on_batch` gets
    the record of each batch. `leave_rotation` is called, once, when this container can run no more batches.
    """

    def __init__(
        self,
        config: ModalConfig,
        source: ModelSource,
        pipeline: InferencePipeline,
        *,
        responses: QueueBackend | None,
        backend: QueueBackend | None,
        leave_rotation: Callable[[], Awaitable[None]],
        on_batch: Callable[[BatchRecord], None],
        records: CallRecords | None = None,
    ) -> None:
        app, deployment = config.app_settings, config.app_settings.deployment_config
        self._config = config
        self._call_timeout_s = max(deployment.timeout - CALL_MARGIN_S, deployment.timeout / 2)
        self._on_batch = on_batch
        self._leave_rotation = leave_rotation
        self._has_warned = False
        self._has_fault = anyio.Event()
        self._published_metrics = None if modal.is_local() else open_metrics(config)
        self._lifetime = Lifetime(self._serve())
        self._jobs = JobManager(MemoryJobStore())  # of the worker's own interface; Modal keeps the jobs of calls
        self.worker = ContainerWorker(
            pipeline, source, on_batch=self._look_at, settings=config.settings, jobs=self._jobs
        )
        self.queue_rules = QueueRules(app.queue_config.allowed_queues, backend)
        self._processor = CallProcessor(
            self.worker,
            app.async_config,
            queue_rules=self.queue_rules,
            responses=responses,
            records=records or (CallRecords(MemoryKeyValueStore()) if modal.is_local() else open_records(config)),
            retries=deployment.retries,
        )

    async def start(self) -> None:
        """Start the worker: warm up, learn costs. Raises what the pipeline raises."""
        await self._lifetime.start()
        if not modal.is_local():
            tune_interpreter()

    async def stop(self, used_s: float = 0.0) -> None:
        """Finish what was accepted, within the grace that Modal gives, of which `used_s` seconds are gone."""
        grace_s = max(0.0, GRACE_S - used_s)
        if not await self._lifetime.stop(grace_s):
            logger.error(
                "What was accepted could not be finished within %g s; Modal runs calls again elsewhere", grace_s
            )

    async def process(self, entries: Sequence[object], options: CallOptions) -> list[dict[str, Any]]:
        """Run a call; see `CallProcessor.process`. Raises `ContainerFaultError` from a container out of rotation."""
        until_s = anyio.current_time() + self._call_timeout_s
        if not self._has_warned and takes_one_input_at_a_time():
            logger.warning(
                "This container takes one input at a time, so batches form only of the items within an input. Decorate "
                "the class, below @app.cls(...), with @modal.concurrent(**modal_config.get_concurrency_settings())"
            )
        self._has_warned = True
        if self._lifetime.is_over and self.worker.fault is None:
            self._note_fault("the worker of this container has ended")
            await self._leave_when_faulty()
        call_id = None if options.accepted_at is None else modal.current_function_call_id()
        call = Call(
            call_id=call_id or modal.current_input_id() or new_job_id(),
            until_s=until_s,
            options=options,
            is_kept=call_id is not None,
        )
        if self.worker.fault is not None:
            return await self._processor.refuse(entries, call, ContainerFaultError(self.worker.fault))
        return await self._processor.process(entries, call)

    @asynccontextmanager
    async def _serve(self) -> AsyncGenerator[None]:
        interval_s = self._config.app_settings.deployment_config.volume_reload_interval_seconds
        published = self._published_metrics
        publishing = nullcontext() if published is None else published.publishing(self._metrics)
        async with publishing, self._jobs, self.worker, plain_task_group() as upkeep:
            upkeep.start_soon(self._watch)
            upkeep.start_soon(self._leave_when_faulty)
            if interval_s is not None:
                upkeep.start_soon(keep_volumes_fresh, self._config, self.worker.pipeline, interval_s)
            yield
            upkeep.cancel_scope.cancel()

    async def _metrics(self) -> str:
        return text_of(of_this_process([self.worker]))

    async def _watch(self) -> None:
        await self.worker.wait_until_broken()
        self._note_fault("batches of this container cannot be run any more")

    def _look_at(self, record: BatchRecord) -> None:
        error = next(filter(is_device_fault, record.errors), None)
        if error is not None:
            self._note_fault(f"the device of this container is broken: {describe_error(error)}")
        elif record.failed and self.worker.is_broken:
            self._note_fault("batches of this container hang, or cannot be run any more")
        self._on_batch(record)

    def _note_fault(self, fault: str) -> None:
        if self.worker.fault is None:
            self.worker.fault = fault
            logger.error("%s; it takes no more inputs, and Modal replaces it", fault)
            self._has_fault.set()

    async def _leave_when_faulty(self) -> None:
        await self._has_fault.wait()
        try:
            await self._leave_rotation()
        except Exception:
            logger.exception("Modal could not be told to send nothing more; what it sends is refused")


async def keep_volumes_fresh(config: ModalConfig, pipeline: InferencePipeline, interval_s: float) -> None:
    """Every `interval_s` seconds, reload the volumes and tell the pipeline, in a thread beside the batches. Never ends.

    What fails is logged, and tried again the next time.
    """
    while True:
        await anyio.sleep(interval_s)
        try:
            if await to_thread.run_sync(config.reload_volumes):
                await to_thread.run_sync(pipeline.on_volume_reload)
        except BaseException as error:
            # The hook is a user's, and may raise anything.
            failed = "The pipeline could not take up what is new on the volumes"
            logger.exception(failed, exc_info=users_error(error))


class Lifetime:
    """Enters a context in one hook and leaves it in another.

    Modal runs each hook as a task of its own, and a task group has to be left by the task that entered it. So one task
    of ours does both, and lives in between. No task group owns it, because none spans Modal's hooks.
    """

    def __init__(self, context: AbstractAsyncContextManager[object]) -> None:
        self._context = context
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the context was left, or broke down."""
        return self._task is None or self._task.done()

    async def start(self) -> None:
        """Enter the context. Raises what entering it raises."""
        entered = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._own(entered), name="modalkit")
        try:
            await entered
        except BaseException:
            self._task.cancel()
            await asyncio.wait([self._task])
            raise

    async def stop(self, grace_s: float) -> bool:
        """Leave the context; cancels that after `grace_s` seconds. Returns whether they were enough."""
        if self._task is None:
            return True
        self._leave.set()
        _, unfinished = await asyncio.wait([self._task], timeout=grace_s)
        if unfinished:
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            logger.error("The worker ended with an error", exc_info=error)
        return not unfinished

    async def _own(self, entered: "asyncio.Future[None]") -> None:
        try:
            async with self._context:
                entered.set_result(None)
                await self._leave.wait()
        except BaseException as error:
            # A cancellation from inside the context, too: `start` would wait for ever.
            if entered.done():
                raise
            entered.set_exception(error)
