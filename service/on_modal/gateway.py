"""The gateway to models that run on Modal, in other containers or in this one."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

import anyio
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, Priority, SchedulerStatistics, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel
from modalkit.service.errors import NotAvailableError, Readiness
from modalkit.service.jobs import Job
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
    """One model of a `ModalGateway`: an asynchronous context manager, and a model as in `service.gateway`."""

    name: str
    input_model: type[BaseModel]
    output_model: type[InferenceOutputModel]

    async def __aenter__(self) -> Self: ...  # as above

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    @property
    def spawner(self) -> JobSpawner | None:
        """What accepts its jobs, if anything does."""
        ...

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""
        ...

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item."""
        ...

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


class ModalJobs:
    """The jobs of these models, as calls that Modal keeps."""

    administration = None

    def __init__(self, models: Mapping[str, Model], jobs: CallJobs) -> None:
        self._models = models
        self._jobs = jobs

    async def submit(
        self, requests: Sequence[AsyncInputModel], *, model_name: str, priority: Priority = Priority.BULK
    ) -> list[Outcome[str]]:
        """Accept many jobs; the id or the error of each, in the same order."""
        spawner = self._models[model_name].spawner
        if spawner is None:
            raise NotAvailableError("this server takes no jobs: give it job_service, a service class that runs them")
        outcomes: list[Outcome[str]] = []
        for start in range(0, len(requests), SUBMITTED_AT_ONCE):
            outcomes += await _submit_all(spawner, requests[start : start + SUBMITTED_AT_ONCE], priority)
        return outcomes

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job as it is now, or once it ends within `wait_s` seconds."""
        return await self._jobs.job(job_id, wait_s)

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended."""
        return await self._jobs.cancel(job_id)


class ModalGateway:
    """The models of a service on Modal, and their jobs."""

    def __init__(self, models: Mapping[str, Model], jobs: CallJobs) -> None:
        self.models = models
        self.jobs = ModalJobs(models, jobs)
        self._exit_stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for model in self.models.values():
                await stack.enter_async_context(model)
            self._exit_stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)


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
