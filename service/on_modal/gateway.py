"""The gateway to models that run on Modal, in other containers or in this one."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import NoReturn, Protocol, Self

import anyio
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, Priority, SchedulerStatistics, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.errors import NotAvailableError
from modalkit.service.gateway import Readiness
from modalkit.service.jobs import Job, JobCounts, JobFilter, JobPage
from modalkit.service.loading import UnknownModelError
from modalkit.service.on_modal.call_jobs import CallJobs, JobSpawner

SUBMITTED_AT_ONCE = 1000


class Predictor(Protocol):
    """Runs items of one model: an `InferenceWorker`, or a `RemotePredictor`."""

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item."""
        ...  # a protocol method has no body

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        ...

    def statistics(self) -> SchedulerStatistics:
        """What was done so far."""
        ...


class Model(Protocol):
    """One model of a `ModalGateway`: an asynchronous context manager."""

    input_model: type[BaseModel]
    output_model: type[InferenceOutputModel]

    async def __aenter__(self) -> Self: ...  # as above

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    @property
    def predictor(self) -> Predictor:
        """What runs its items; there once the model is open."""
        ...

    @property
    def spawner(self) -> JobSpawner | None:
        """What accepts its jobs, if anything does."""
        ...

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        ...


class ModalGateway:
    """See `Gateway`. What Modal's calls cannot do, listing above all, raises `NotAvailableError`."""

    def __init__(self, models: Mapping[str, Model], jobs: CallJobs) -> None:
        self._models = models
        self._jobs = jobs
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for model in self._models.values():
                await stack.enter_async_context(model)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    def input_model(self, model_name: str | None = None) -> type[BaseModel]:
        """What a model's items are validated as. Raises `UnknownModelError`."""
        return self._model(model_name).input_model

    def output_model(self, model_name: str | None = None) -> type[InferenceOutputModel]:
        """What a model's outputs look like. Raises `UnknownModelError`."""
        return self._model(model_name).output_model

    def readiness(self) -> Mapping[str, Readiness]:
        """Each model's state. One in other containers is always ready: Modal starts them when they are needed."""
        return {name: model.readiness for name, model in self._models.items()}

    def statistics(self) -> Mapping[str, SchedulerStatistics]:
        """What this process did; of a model in other containers, the lists that it sent there."""
        return {name: model.predictor.statistics() for name, model in self._models.items()}

    async def predict(
        self,
        item: BaseModel,
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> InferenceOutputModel:
        """See `Predictor`."""
        predictor = self._model(model_name).predictor
        return await predictor.predict(item, priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """See `Predictor`."""
        predictor = self._model(model_name).predictor
        return await predictor.predict_many(items, priority=priority, timeout_s=timeout_s)

    async def submit(
        self, request: AsyncInputModel, *, model_name: str | None = None, priority: Priority = Priority.BULK
    ) -> str:
        """See `JobSpawner.submit`."""
        return await self._spawner(model_name).submit(request, priority)

    async def submit_many(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str | None = None,
        priority: Priority = Priority.BULK,
    ) -> list[Outcome[str]]:
        """Accept many jobs; the id or the error of each, in the same order."""
        spawner = self._spawner(model_name)
        outcomes: list[Outcome[str]] = []
        for start in range(0, len(requests), SUBMITTED_AT_ONCE):
            outcomes += await _submit_all(spawner, requests[start : start + SUBMITTED_AT_ONCE], priority)
        return outcomes

    async def job(self, job_id: str, *, wait_s: float = 0.0) -> Job | None:
        """See `CallJobs.job`."""
        return await self._jobs.job(job_id, wait_s)

    async def cancel(self, job_id: str) -> Job | None:
        """See `CallJobs.cancel`."""
        return await self._jobs.cancel(job_id)

    async def jobs(self, limit: int, which: JobFilter, cursor: int | None = None) -> JobPage:  # noqa: ARG002  # the protocol's
        """Not available."""
        _refuse("Modal's calls cannot be listed")

    async def replay(self, job_ids: Sequence[str] | None = None) -> int:  # noqa: ARG002  # the protocol's
        """Not available."""
        _refuse("a result that was not delivered stays in GET /jobs/{job_id} for seven days; submit the job again")

    async def purge(self, which: JobFilter) -> int:  # noqa: ARG002  # the protocol's
        """Not available."""
        _refuse("Modal removes results by itself after seven days")

    async def job_counts(self) -> JobCounts:
        """Not available."""
        _refuse("Modal's calls cannot be counted")

    def _model(self, model_name: str | None) -> Model:
        if model_name is None:
            return next(iter(self._models.values()))
        try:
            return self._models[model_name]
        except KeyError:
            raise UnknownModelError(model_name, list(self._models)) from None

    def _spawner(self, model_name: str | None) -> JobSpawner:
        spawner = self._model(model_name).spawner
        if spawner is None:
            _refuse("this server takes no jobs: give it job_service, a service class that runs them")
        return spawner


def _refuse(reason: str) -> NoReturn:
    raise NotAvailableError(f"jobs run as Modal's calls here: {reason}")


async def _submit_all(
    spawner: JobSpawner, requests: Sequence[AsyncInputModel], priority: Priority
) -> list[Outcome[str]]:
    outcomes: list[Outcome[str]] = [Failure(RuntimeError("it was not submitted"))] * len(requests)

    async def submit(index: int, request: AsyncInputModel) -> None:
        try:
            outcomes[index] = Success(await spawner.submit(request, priority))
        except Exception as error:  # noqa: BLE001  # one job's refusal is no other's
            outcomes[index] = Failure(error)

    async with anyio.create_task_group() as task_group:
        for index, request in enumerate(requests):
            task_group.start_soon(submit, index, request)
    return outcomes
