"""Runs stored jobs in the scheduler of a worker."""

from collections.abc import Callable, Sequence
from functools import partial

from pydantic import BaseModel

from modalkit.batching import BatchScheduler, Failure, Success
from modalkit.batching.errors import users_error
from modalkit.batching.pending import Withdraw
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.jobs import Job
from modalkit.service.jobs.runner import JobOutcome
from modalkit.service.streams import Payload, StreamedItem, item_of


class JobsInScheduler:
    """The `JobEngine` of a worker."""

    def __init__(
        self,
        scheduler: BatchScheduler[Payload, InferenceOutputModel],
        input_model: type[BaseModel],
        on_piece: Callable[[str, InferenceOutputModel], None] | None,
    ) -> None:
        self._scheduler = scheduler
        self.input_model = input_model
        self._on_piece = on_piece

    @property
    def is_closed(self) -> bool:
        """Whether the scheduler takes no more requests."""
        return not self._scheduler.is_open

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Withdraw:
        """Run a job in some batch."""
        item: Payload = (
            job.item
            if isinstance(job.item, self.input_model)
            else self.input_model.model_validate_json(job.message_json)
        )
        if self._on_piece is not None:
            item = StreamedItem(item_of(item), partial(self._on_piece, job.job_id), may_repeat=True)
        return self._scheduler.submit_nowait(
            item, on_outcome, priority=job.priority, owner=job.owner, tag=job.traceparent
        )

    async def run_as_one_batch(self, jobs: Sequence[Job]) -> Sequence[JobOutcome]:
        """Run jobs while no other is in the pipeline."""
        outcomes: dict[str, JobOutcome] = {}
        items: dict[str, BaseModel] = {}
        for job in jobs:
            try:
                items[job.job_id] = self.input_model.model_validate_json(job.message_json)
            except BaseException as error:  # noqa: BLE001  # an item that is not valid any more fails alone
                outcomes[job.job_id] = Failure(users_error(error))
        if items:
            outputs = await self._scheduler.run_as_one_batch(list(items.values()))
            for job_id, output in zip(items, outputs, strict=True):
                outcomes[job_id] = Failure(output) if isinstance(output, Exception) else Success(output)
        return [outcomes[job.job_id] for job in jobs]
