"""The models of a `ModalGateway`: run in other containers, or in this one."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import modal.exception
from pydantic import BaseModel

from modalkit.batching import Outcome, Priority, SchedulerStatistics
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import NotReadyError, Readiness
from modalkit.service.jobs.queue_rules import QueueRules
from modalkit.service.on_modal.call_jobs import JobSpawner
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.gateway import Predictor
from modalkit.service.on_modal.ledger import CallLedger
from modalkit.service.on_modal.lists import RemotePredictor
from modalkit.service.on_modal.remote import ModalRemoteService, RemoteService
from modalkit.service.on_modal.runtime import takes_one_input_at_a_time
from modalkit.service.settings import AppSettings
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[RemoteService]]


class RemoteModel:
    """A model in other containers. `connect` reaches them, once the model is opened."""

    def __init__(
        self,
        model_name: str,
        input_model: type[BaseModel],
        output_model: type[InferenceOutputModel],
        connect: Connect,
        *,
        ledger: CallLedger,
        queue_rules: QueueRules,
        settings: AppSettings,
    ) -> None:
        self.input_model = input_model
        self.output_model = output_model
        self.name = model_name
        self._connect = connect
        self._ledger = ledger
        self._queue_rules = queue_rules
        self._settings = settings
        self._predictor: RemotePredictor | None = None
        self._spawner: JobSpawner | None = None
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        remote, batch_config = await self._connect(), self._settings.batch_config
        async with AsyncExitStack() as stack:
            self._predictor = await stack.enter_async_context(RemotePredictor(remote, batch_config, name=self.name))
            self._spawner = await stack.enter_async_context(
                JobSpawner(remote, self._ledger, self._queue_rules, batch_config, model_name=self.name)
            )
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    @property
    def predictor(self) -> Predictor:
        """See `Model`."""
        if self._predictor is None:
            raise NotReadyError(self.name, self.readiness)
        return self._predictor

    @property
    def spawner(self) -> JobSpawner | None:
        """See `Model`."""
        return self._spawner

    @property
    def readiness(self) -> Readiness:
        """See `Model`."""
        return Readiness.LOADING if self._predictor is None else Readiness.READY

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item."""
        return await self.predictor.predict(item, priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        return await self.predictor.predict_many(items, priority=priority, timeout_s=timeout_s)

    def statistics(self) -> SchedulerStatistics:
        """What was done so far."""
        return self.predictor.statistics()


class ModelHere:
    """A model whose worker runs in this container; its jobs become calls, by way of `connect`, where there is one."""

    def __init__(
        self,
        worker: InferenceWorker,
        input_model: type[BaseModel],
        output_model: type[InferenceOutputModel],
        connect: Connect | None,
        *,
        ledger: CallLedger,
        queue_rules: QueueRules,
        settings: AppSettings,
    ) -> None:
        self.input_model = input_model
        self.output_model = output_model
        self.name = worker.model_name
        self.predictor: Predictor = worker
        self.spawner: JobSpawner | None = None
        self._worker = worker
        self._connect = connect
        self._ledger = ledger
        self._queue_rules = queue_rules
        self._settings = settings

    async def __aenter__(self) -> Self:
        if self._connect is not None:
            self.spawner = JobSpawner(
                await self._connect(),
                self._ledger,
                self._queue_rules,
                self._settings.batch_config,
                model_name=self._worker.model_name,
            )
            await self.spawner.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return None if self.spawner is None else await self.spawner.__aexit__(exc_type, exc, traceback)

    @property
    def readiness(self) -> Readiness:
        """See `Model`."""
        return Readiness.BROKEN if self._worker.is_broken else Readiness.READY

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item."""
        return await self.predictor.predict(item, priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        return await self.predictor.predict_many(items, priority=priority, timeout_s=timeout_s)

    def statistics(self) -> SchedulerStatistics:
        """What was done so far."""
        return self.predictor.statistics()


def connection(app_cls: Any, config: ModalConfig, parameters: Mapping[str, Any]) -> Connect:
    """Reaches the containers of a class of Modal's, which may be registered here or looked up.

    A class that is not decorated with `modal.concurrent` gets its concurrency here, because otherwise each container
    would run one list at a time.
    """

    async def connect() -> RemoteService:
        instance = app_cls(**parameters)
        if not await _is_concurrent(instance.process_request):
            instance = app_cls.with_concurrency(**_concurrency(config))(**parameters)
            if config.app_settings.deployment_config.min_containers:
                logger.warning(
                    "min_containers keeps containers warm that these requests do not reach: decorate the class, below "
                    "@app.cls(...), with @modal.concurrent(**modal_config.get_concurrency_settings())"
                )
        return ModalRemoteService(instance.process_request)

    return connect


async def _is_concurrent(process_request: Any) -> bool:
    try:
        info = await process_request.info.aio()
    except modal.exception.Error:
        logger.exception("Modal could not be asked whether the service class is decorated with modal.concurrent")
        return False
    return info.concurrency_info is not None


def _concurrency(config: ModalConfig) -> dict[str, int]:
    settings = config.get_concurrency_settings()
    if takes_one_input_at_a_time() and config.app_settings.deployment_config.target_concurrent_inputs is None:
        settings.pop("target_inputs")  # this web container's inputs are no lists, but single items
    return settings
