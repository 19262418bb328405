"""The frontend's side of items that a caller waits for: gathers them into calls of a worker."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self, Unpack

import anyio
from anyio import AsyncContextManagerMixin
from pydantic import BaseModel

from modalkit.batching import (
    BatchPolicy,
    BatchScheduler,
    Failure,
    Outcome,
    PaddedCostModel,
    Priority,
    QueueOptions,
    RequestOptions,
    SchedulerStatistics,
    Success,
)
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.calls.engine import CallClient, CallOptions
from modalkit.service.calls.wire_format import json_form, read_outcome
from modalkit.service.errors import NotReadyError, Readiness, RemoteCallError, RemoteItemError, ServiceError
from modalkit.service.metrics import BatchMetrics
from modalkit.service.settings import BatchConfig

MAX_CALLS_IN_FLIGHT = 64
"""Most calls that one process has under way to one model."""
MAX_PARTIAL_CALLS_IN_FLIGHT = 4
"""Most of them that are sent with fewer items than a batch takes: one that runs and one on its way, for two workers.

More of them would each be smaller, and a worker fetches a small call as slowly as a full one.
"""

COST_OF_A_CALL = PaddedCostModel(fixed_s=1.0, token_s=0.0)
"""A round trip, however many entries the call has."""


def call_policy(config: BatchConfig, *, max_waiting: int = 0) -> BatchPolicy:
    """Calls as long as a batch of the worker, so that a bad call costs no more than a bad batch.

    As many entries may wait to be sent as may wait for a worker, and at least `max_waiting`.
    """
    return BatchPolicy(
        max_batch_size=config.max_batch_size,
        max_queue_items=max(config.max_queue_size, max_waiting),
        max_queue_s=config.max_queue_seconds,
        mixes_lanes=False,  # a call has one priority
    )


@dataclass(frozen=True, slots=True)
class _Item:
    message: Any
    priority: Priority
    deadline_s: float | None


class CallModel(AsyncContextManagerMixin):
    """A model that workers run, called by a `CallClient`: the `Model` of a gateway. An async context manager.

    Items that come together share calls. Leaving it waits for what was accepted. It is ready as long as it is open,
    because an engine starts workers when calls come. Its messages travel as JSON; workers validate them as the class
    that `input_model_path` names, by default the one of their configuration.
    """

    def __init__(
        self,
        name: str,
        client: CallClient,
        config: BatchConfig,
        *,
        input_model: type[BaseModel],
        output_model: type[InferenceOutputModel],
        input_model_path: str | None = None,
    ) -> None:
        self.name = name
        self.input_model = input_model
        self.output_model = output_model
        self.input_model_path = input_model_path
        self._client = client
        self.readiness = Readiness.LOADING
        """Whether it takes items."""
        self.problem: str | None = None
        self._scheduler: BatchScheduler[_Item, InferenceOutputModel] = BatchScheduler(
            self._call,
            policy=call_policy(config),
            cost_model=COST_OF_A_CALL,
            max_in_flight=MAX_CALLS_IN_FLIGHT,
            max_partial_in_flight=MAX_PARTIAL_CALLS_IN_FLIGHT,
            on_batch=BatchMetrics(name),
            name=f"calls of {name}",
        )

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        async with self._scheduler:
            self.readiness = Readiness.READY
            yield self
            self.readiness = Readiness.DRAINING

    def check_room(self, **options: Unpack[RequestOptions]) -> None:
        """Raise what a request should be refused with now: `NotReadyError`, what `BatchScheduler.check_room` raises."""
        self._check_readiness()
        self._scheduler.check_room(**options)

    async def predict(self, item: BaseModel, **options: Unpack[RequestOptions]) -> InferenceOutputModel:
        """Run one item. Raises what `BatchScheduler.submit` does, `RemoteItemError`, `RemoteCallError`."""
        self._check_readiness()
        return await self._scheduler.submit(_item(item, **options), **options)

    async def predict_pieces(
        self, item: BaseModel, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[InferenceOutputModel | Success[InferenceOutputModel]]:
        """Run one item; yields only its result, because calls return results as a whole."""
        yield Success(await self.predict(item, **options))

    def predict_many_nowait(
        self,
        items: Sequence[BaseModel],
        on_outcome: Callable[[int, Outcome[InferenceOutputModel]], None],
        **options: Unpack[QueueOptions],
    ) -> list[Callable[[], object] | Failure]:
        """Queue items and return at once; see `BatchScheduler.submit_many_nowait`."""
        self._check_readiness()
        waiting = [_item(item, **options) for item in items]
        return self._scheduler.submit_many_nowait(waiting, on_outcome, **options)

    async def predict_many(
        self, items: Sequence[BaseModel], **options: Unpack[RequestOptions]
    ) -> list[Outcome[InferenceOutputModel]]:
        """Run several items; outcomes in the same order."""
        self._check_readiness()
        waiting = [_item(item, **options) for item in items]
        return await self._scheduler.submit_many(waiting, **options)

    @property
    def engine_choice(self) -> None:
        """Nothing: another process computes the model."""
        return

    def statistics(self) -> SchedulerStatistics:
        """What this process sent: its batches are calls."""
        return self._scheduler.statistics()

    def _check_readiness(self) -> None:
        if self.readiness is Readiness.LOADING:
            raise NotReadyError(self.name, self.readiness)

    async def _call(self, items: list[_Item]) -> Sequence[InferenceOutputModel | Exception]:
        now, deadlines = anyio.current_time(), [item.deadline_s for item in items]
        options = CallOptions(
            priority=str(items[0].priority),
            timeouts_s=[None if deadline_s is None else max(0.001, deadline_s - now) for deadline_s in deadlines]
            if any(deadlines)
            else None,
            input_model=self.input_model_path,
        )
        entries = [{"message": item.message} for item in items]
        try:
            return _read(await self._client.call(self.name, entries, options), len(items))
        except ServiceError as error:
            # Returned, because the scheduler would send the call of a raised error again in parts.
            return [error] * len(items)


def _item(item: BaseModel, **options: Unpack[RequestOptions]) -> _Item:
    timeout_s = options.get("timeout_s")
    priority = options.get("priority", Priority.INTERACTIVE)
    return _Item(json_form(item), priority, None if timeout_s is None else anyio.current_time() + timeout_s)


def _read(outcomes: Sequence[Mapping[str, Any]], count: int) -> list[InferenceOutputModel | RemoteItemError]:
    try:
        read = [read_outcome(outcome) for outcome in outcomes]
    except Exception as error:
        raise RemoteCallError(f"process_request returned what is no list of outcomes: {outcomes!r:.100}") from error
    if len(read) != count:
        raise RemoteCallError(f"process_request must return an outcome for each of {count} entries, got {len(read)}")
    return read
