"""Gathers single requests into lists, because a container fetches one input at a time, however small."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
from pydantic import BaseModel

from modalkit.batching import BatchPolicy, BatchScheduler, Outcome, PaddedCostModel, Priority, SchedulerStatistics
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import RemoteCallError, RemoteItemError, ServiceError
from modalkit.service.on_modal.call_format import read_outcome
from modalkit.service.on_modal.remote import RemoteService
from modalkit.service.settings import BatchConfig

LISTS_IN_FLIGHT = 64
"""Most lists that one process has under way to one model."""
EAGER_LISTS = 4
"""How many lists of fewer items than a batch takes are under way: one that runs and one on its way, for two containers.

More of them would each be smaller, where a container fetches a small one as slowly as a full one.
"""

BY_THE_CALL = PaddedCostModel(fixed_s=1.0, token_s=0.0)
"""What a call costs: a round trip, whatever its list holds."""


def list_policy(config: BatchConfig, *, may_wait: int = 0) -> BatchPolicy:
    """Lists as long as a batch of the container: then one bad list costs no more than one bad batch would.

    As many items may wait to be sent as could wait for a worker, and at least `may_wait`.
    """
    return BatchPolicy(
        max_batch_size=config.max_batch_size,
        max_queue_items=max(config.max_queue_size, may_wait),
        mixes_lanes=False,  # a list says of which class it is
    )


@dataclass(frozen=True, slots=True)
class _Request:
    message: dict[str, Any]
    priority: Priority
    until_s: float | None


class RemotePredictor:
    """Runs items in containers, many in one call. What it does for its callers is what `InferenceWorker` does.

    An async context manager; leaving it waits for what was accepted.
    """

    def __init__(self, remote: RemoteService, config: BatchConfig, *, name: str) -> None:
        self._remote = remote
        self._scheduler: BatchScheduler[_Request, InferenceOutputModel] = BatchScheduler(
            self._run,
            policy=list_policy(config),
            cost_model=BY_THE_CALL,
            max_in_flight=LISTS_IN_FLIGHT,
            max_partial_in_flight=EAGER_LISTS,
            name=f"lists for {name}",
        )

    async def __aenter__(self) -> Self:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._scheduler.__aexit__(exc_type, exc, traceback)

    async def predict(
        self, item: BaseModel, *, priority: Priority = Priority.INTERACTIVE, timeout_s: float | None = None
    ) -> InferenceOutputModel:
        """Run one item. Raises what `BatchScheduler.submit` does, `RemoteItemError`, `RemoteCallError`."""
        return await self._scheduler.submit(_request(item, priority, timeout_s), priority=priority, timeout_s=timeout_s)

    async def predict_many(
        self,
        items: Sequence[BaseModel],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        requests = [_request(item, priority, timeout_s) for item in items]
        return await self._scheduler.submit_many(requests, priority=priority, timeout_s=timeout_s)

    def statistics(self) -> SchedulerStatistics:
        """What was sent: its batches are lists."""
        return self._scheduler.statistics()

    async def _run(self, requests: list[_Request]) -> Sequence[InferenceOutputModel | Exception]:
        now = anyio.current_time()
        options: dict[str, Any] = {"priority": str(requests[0].priority)}
        if any(request.until_s is not None for request in requests):
            options["timeouts_s"] = [
                None if request.until_s is None else max(0.001, request.until_s - now) for request in requests
            ]
        entries = [{"message": request.message} for request in requests]
        try:
            return _read(await self._remote.process(entries, **options), len(requests))
        except ServiceError as error:
            # Given to each of them, as a failure of the call itself would have the list sent again in parts.
            return [error] * len(requests)


def _read(outcomes: Sequence[Mapping[str, Any]], count: int) -> list[InferenceOutputModel | RemoteItemError]:
    try:
        read = [read_outcome(outcome) for outcome in outcomes]
    except Exception as error:
        raise RemoteCallError(f"process_request returned what is no list of outcomes: {outcomes!r:.100}") from error
    if len(read) != count:
        raise RemoteCallError(f"process_request must return an outcome for each of {count} entries, got {len(read)}")
    return read


def _request(item: BaseModel, priority: Priority, timeout_s: float | None) -> _Request:
    message = item.model_dump(mode="json", by_alias=True, round_trip=True)
    return _Request(message, priority, None if timeout_s is None else anyio.current_time() + timeout_s)
