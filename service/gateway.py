"""The protocols between frontends (HTTP, the command line) and engines that run models and jobs."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar, Unpack

from pydantic import BaseModel

from modalkit.batching import (
    Failure,
    Outcome,
    QueueOptions,
    RequestOptions,
    SchedulerStatistics,
    Success,
)
from modalkit.pipelines import AsyncInputModel, EngineChoice, InferenceOutputModel
from modalkit.service.errors import Readiness, UnknownModelError
from modalkit.service.jobs import Job, JobBatchLines, JobPiece
from modalkit.service.jobs.manager import JobManager
from modalkit.service.settings import BatchConfig


class Model(Protocol):
    """One model."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @property
    def input_model(self) -> type[BaseModel]:
        """What its items are validated as; known before the model is loaded."""

    @property
    def output_model(self) -> type[InferenceOutputModel]:
        """What its outputs look like; known before the model is loaded."""

    @property
    def readiness(self) -> Readiness:
        """Whether it takes requests."""

    @property
    def problem(self) -> str | None:
        """Why it takes no requests, or should get none; None where that is not known."""

    def check_room(self, **options: Unpack[RequestOptions]) -> None:
        """Raise what a request should be refused with now: `NotReadyError`, what `BatchScheduler.check_room` raises."""

    async def predict(self, item: BaseModel, **options: Unpack[RequestOptions]) -> InferenceOutputModel:
        """Run one item. Raises `NotReadyError`, and what `InferenceWorker.predict` raises."""

    def predict_pieces(
        self, item: BaseModel, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[InferenceOutputModel | Success[InferenceOutputModel]]:
        """Run one item; yields pieces of its result, where the engine passes them on, and then its `Success`.

        Raises, at the first step or later, what `predict` raises.
        """
        ...

    def predict_many_nowait(
        self,
        items: Sequence[BaseModel],
        on_outcome: Callable[[int, Outcome[InferenceOutputModel]], None],
        **options: Unpack[QueueOptions],
    ) -> list[Callable[[], object] | Failure]:
        """Queue items, all or none, and return at once; `on_outcome` gets the place of each, from 0, and its outcome.

        Returns, in their order, what withdraws each, or the `Failure` of one that cannot be queued. Raises
        `NotReadyError`, `QueueFullError` and `SchedulerClosedError`.
        """
        ...

    async def predict_many(
        self, items: Sequence[BaseModel], **options: Unpack[RequestOptions]
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run items; outcomes in their order. Raises `NotReadyError` and what `InferenceWorker.predict_many` raises."""

    @property
    def engine_choice(self) -> EngineChoice | None:
        """What computes the model in this process, where its pipeline says so; None before it is loaded."""
        ...

    def statistics(self) -> SchedulerStatistics | None:
        """What this process did for the model so far; None before the model is loaded."""


class Jobs(Protocol):
    """The jobs of all models. Methods raise `JobStoreError`."""

    @property
    def administration(self) -> JobManager | None:
        """What can be done with many jobs at once; None where the engine cannot list, replay, purge or count jobs."""

    @property
    def failure(self) -> Exception | None:
        """Why jobs can neither be accepted nor read now; None where they can, or where that is not known."""

    def check_accepting(self, model_name: str) -> None:
        """Raise what `submit` would raise for any job of this model now."""

    async def submit(
        self,
        requests: Sequence[AsyncInputModel],
        *,
        model_name: str,
        batch: JobBatchLines | None = None,
        **options: Unpack[QueueOptions],
    ) -> list[Outcome[str]]:
        """Accept jobs for one model; the id or the error of each, in the same order.

        They belong to the `owner`, the name of an API key, and to none if it is empty. With a `batch`, they are lines
        of it; `NotAvailableError` says that the engine has none. An invalid request disturbs no
        other. Raises `UnknownModelError`, and `NotReadyError` where the model takes no jobs now.
        """

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job | None:
        """The job as it is now, or once it ends within `wait_s` seconds; None if there is none."""

    def watch(self, job_ids: Sequence[str]) -> AsyncGenerator[Job | JobPiece]:
        """Jobs as they are now, and again after changes, and pieces of their results; unknown ones are left out.

        It ends once all have ended, or the gateway closes. Of changes that follow each other fast, only the last may be
        seen.
        """
        ...

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended; returns the job as it then is, or None if there is none."""


class ModelAdministration(Protocol):
    """What can be done with the models of an engine while they run. Methods raise `UnknownModelError`."""

    async def reload(self, model_name: str) -> None:
        """Load a model anew by the configuration as it is now, beside the one that runs, and replace that.

        No request fails for it. Where it raises, the old one goes on: `NotReadyError` where none runs, `ReloadError`,
        `LoadError` and `SettingsError`.
        """

    async def set_limits(self, model_name: str, limits: Mapping[str, Any]) -> None:
        """Change limits of a model's batches, keys of `batch_config`, until it is reloaded or started.

        Raises `NotReadyError`, `ReloadError` during a reload, and `InvalidItemError` for limits that cannot hold.
        """

    def limits(self, model_name: str) -> BatchConfig | None:
        """The limits of a model's batches; None where it does not run."""


class Gateway(AbstractAsyncContextManager["Gateway"], Protocol):
    """Models and jobs of one engine. An asynchronous context manager: leaving it finishes what was accepted."""

    @property
    def models(self) -> Mapping[str, Model]:
        """The models by their names; the first is the default. There is at least one."""

    @property
    def jobs(self) -> Jobs:
        """The jobs of these models."""

    async def metrics_of_processes(self, own: str) -> Mapping[str, str]:
        """The metrics of each process of the service, in Prometheus's text format, by its id; this one's are `own`.

        Where no other process has any, the id is empty.
        """
        ...

    @property
    def administration(self) -> ModelAdministration | None:
        """None where the engine cannot reload models."""

    @property
    def is_draining(self) -> bool:
        """Whether it is about to be left, so that answers without an end should end."""
        ...


ModelT = TypeVar("ModelT", bound=Model)


def find_model(models: Mapping[str, ModelT], name: str | None) -> ModelT:
    """The model of this name, or the first for None. Raises `UnknownModelError`."""
    if name is None:
        return next(iter(models.values()))
    try:
        return models[name]
    except KeyError:
        raise UnknownModelError(name, list(models)) from None
