"""What runs inside a container: a worker with its upkeep, and what takes the container out of rotation."""

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import modal
from pydantic_core import to_jsonable_python

from modalkit.batching import BatchRecord, Priority
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import ContainerFaultError
from modalkit.service.jobs import MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import new_job_id
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.loading import ModelSource
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.ledger import CallLedger, MemoryTable
from modalkit.service.on_modal.lifetime import Lifetime
from modalkit.service.on_modal.processing import Call, ListProcessor
from modalkit.service.on_modal.responses import ResponseSender
from modalkit.service.on_modal.runtime import takes_one_input_at_a_time
from modalkit.service.on_modal.tables import open_ledger
from modalkit.service.on_modal.volumes import keep_volumes_fresh
from modalkit.service.on_modal.watched_worker import WatchedWorker
from modalkit.service.queue_backends import QueueBackend
from modalkit.service.serving import freeze_gc
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

GRACE_S = 25.0
"""How long to finish what was accepted; Modal gives an exit hook 30 seconds."""
MARGIN_S = 5.0
"""How long before Modal gives up on a call it returns by itself."""
KEPT_RECORDS = 10_000

_ONE_INPUT_AT_A_TIME = (
    "This container takes one input at a time, so batches form only of the items within an input. Decorate the class, "
    "below @app.cls(...), with @modal.concurrent(**modal_config.get_concurrency_settings())"
)


class Container:
    """Runs one pipeline. Started in one Modal hook and stopped in another; does without Modal in any other program.

    Results of jobs go to `responses`, if there is one; `backend` says which names its queues may have. `leave_rotation`
    is called, once, when this container can run no more batches.
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
        ledger: CallLedger | None = None,
    ) -> None:
        app, deployment = config.app_settings, config.app_settings.deployment_config
        self._config = config
        self._pipeline = pipeline
        self._input_model = source.input_model
        self._call_timeout_s = max(deployment.timeout - MARGIN_S, deployment.timeout / 2)
        self._reload_interval_s = deployment.volume_reload_interval_seconds
        self._records: deque[BatchRecord] = deque(maxlen=KEPT_RECORDS)
        self._lifetime = Lifetime(self._serve())
        self._has_warned = False
        self._leave_rotation = leave_rotation
        self._fault: str | None = None
        self._has_fault = anyio.Event()
        self._worker: InferenceWorker | None = None
        self._processor: ListProcessor | None = None
        self._ledger = ledger or (CallLedger(MemoryTable()) if modal.is_local() else open_ledger(config))
        self._queue_rules = QueueRules(app.queue_config.allowed_queues, backend)
        self._sender = (
            None
            if responses is None
            else ResponseSender(responses, max_attempts=app.async_config.max_delivery_attempts)
        )

    async def start(self) -> None:
        """Start the worker: warm up, learn costs. Raises what the pipeline raises."""
        self._worker = await self._lifetime.start()
        app = self._config.app_settings
        self._processor = ListProcessor(
            self._worker,
            queue_rules=self._queue_rules,
            sender=self._sender,
            ledger=self._ledger,
            job_timeout_s=app.async_config.timeout,
            retries=app.deployment_config.retries,
        )
        if not modal.is_local():
            freeze_gc()

    async def stop(self, used_s: float = 0.0) -> None:
        """Finish what was accepted, within the grace that Modal gives, of which `used_s` seconds are gone."""
        grace_s = max(0.0, GRACE_S - used_s)
        if not await self._lifetime.stop(grace_s):
            logger.error(
                "What was accepted could not be finished within %g s; Modal runs calls again elsewhere", grace_s
            )

    @property
    def worker(self) -> InferenceWorker:
        """The worker. Raises `RuntimeError` before `start`."""
        if self._worker is None:
            raise RuntimeError("the service is not running: use it inside 'async with', or in a Modal container")
        return self._worker

    async def process(
        self,
        entries: Sequence[object],
        *,
        priority: Priority | None,
        timeouts_s: Sequence[float | None] | None,
        accepted_at: float | None,
    ) -> list[dict[str, Any]]:
        """Run a list; see `ListProcessor.process`. Raises `ContainerFaultError` from a container out of rotation."""
        until_s = anyio.current_time() + self._call_timeout_s
        if self._processor is None:
            raise RuntimeError("the service is not running: use it inside 'async with', or in a Modal container")
        self._warn_of_one_input()
        if self._lifetime.is_over and self._fault is None:
            self._note_fault("the worker of this container has ended")
            await self._leave_when_faulty()
        call_id = None if accepted_at is None else modal.current_function_call_id()
        call = Call(
            call_id=call_id or modal.current_input_id() or new_job_id(),
            until_s=until_s,
            priority=priority,
            timeouts_s=timeouts_s,
            accepted_at=accepted_at,
            is_recorded=call_id is not None,
        )
        if self._fault is not None:
            return await self._processor.refuse(entries, call, ContainerFaultError(self._fault))
        return await self._processor.process(entries, call)

    def report(self) -> dict[str, Any]:
        """The statistics so far, and the records of the latest batches, which are then forgotten; plain values."""
        records = list(self._records)
        self._records.clear()
        report: dict[str, Any] = to_jsonable_python(
            {"device": self._pipeline.device_name(), "statistics": self.worker.statistics(), "records": records}
        )
        return report

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[InferenceWorker]:
        async with (
            # Jobs of calls are kept by Modal; this one is for what the worker's own interface needs.
            JobManager(MemoryJobStore()) as jobs,
            WatchedWorker(
                self._pipeline,
                on_fault=self._note_fault,
                settings=self._config.settings,
                jobs=jobs,
                input_model=self._input_model,
                on_batch=self._records.append,
            ) as worker,
            plain_task_group() as upkeep,
        ):
            upkeep.start_soon(self._leave_when_faulty)
            if self._reload_interval_s is not None:
                upkeep.start_soon(keep_volumes_fresh, self._config, self._pipeline, self._reload_interval_s)
            yield worker
            upkeep.cancel_scope.cancel()

    def _warn_of_one_input(self) -> None:
        if not self._has_warned and takes_one_input_at_a_time():
            logger.warning(_ONE_INPUT_AT_A_TIME)
        self._has_warned = True

    def _note_fault(self, fault: str) -> None:
        self._fault = fault
        logger.error("%s; it takes no more inputs, and Modal replaces it", fault)
        self._has_fault.set()

    async def _leave_when_faulty(self) -> None:
        await self._has_fault.wait()
        try:
            await self._leave_rotation()
        except Exception:
            logger.exception("Modal could not be told to send nothing more; whatever comes is refused")
