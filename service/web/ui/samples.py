"""The samples for the page, one each second: the state of models and jobs, and the batches since the last sample."""

import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import anyio
from pydantic_core import to_json

from modalkit.batching import BatchRecord, Priority
from modalkit.service.gateway import Gateway, Model
from modalkit.service.jobs import JobStoreError
from modalkit.service.web.events import sse_event

PERIOD_S = 1.0
MAX_DETAILED = 32
"""Newest batches of a sample that list each of their requests."""
PAGE_TRACES = "6d6f64616c6b6974"
"""The beginning of the trace ids of requests from the page, by which it finds their batches."""

_STATISTICS = (
    *("queued", "work_s", "oldest_s", "running", "batches", "predict_s", "open_s"),
    *("succeeded", "failed", "expired", "cancelled", "refused"),
)
"""Fields of the statistics that a sample has unchanged."""


class Sampler:
    """Makes one sample each second for all viewers, and none while there is no viewer."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._lock = anyio.Lock()
        self._tick = 0
        """The last sample was made for this multiple of the period."""
        self._shown: dict[str, int] = {}
        """How many batches of each model there were when the last sample was made."""
        self._event = b""

    async def watch(self) -> AsyncGenerator[bytes]:
        """An event ``sample`` at once, with all batches that are kept, and then each second; ends with the service."""
        yield await self._sample({})
        tick = 0
        while not self._gateway.is_draining:
            tick = max(tick + 1, math.ceil(anyio.current_time() / PERIOD_S))
            await anyio.sleep_until(tick * PERIOD_S)
            yield await self._shared_sample(tick)

    async def _shared_sample(self, tick: int) -> bytes:
        async with self._lock:
            if tick > self._tick:
                self._event = await self._sample(self._shown)
                self._tick = tick
            return self._event

    async def _sample(self, shown: dict[str, int]) -> bytes:
        """An event, with the batches of each model that are not among the first `shown` ones, which it updates."""
        jobs = await self._jobs()  # first: a viewer that leaves meanwhile has taken no batch from the others
        models = {name: self._model(model, shown) for name, model in self._gateway.models.items()}
        content = {"at": time.time(), "models": models, "jobs": jobs}
        return sse_event("sample", to_json(content, inf_nan_mode="null"))

    def _model(self, model: Model, shown: dict[str, int]) -> dict[str, Any]:
        administration = self._gateway.administration
        limits = None if administration is None else administration.limits(model.name)
        state = {
            "readiness": model.readiness,
            "problem": model.problem,
            "engine": model.engine_choice,
            "limits": None if limits is None else limits.model_dump(mode="json", exclude={"calibration"}),
        }
        if (done := model.statistics()) is None:
            return state
        before = shown.get(model.name, 0)
        shown[model.name] = done.batches
        new = done.batches - before if done.batches >= before else done.batches  # a model that failed counts anew
        recent = done.recent[-new:] if new else ()
        first = done.batches - len(recent) + 1
        clock_s = time.time() - anyio.current_time()
        return {
            **state,
            **{name: getattr(done, name) for name in _STATISTICS},
            "recent": [
                {"number": number, **_batch(record, clock_s, is_detailed=number > done.batches - MAX_DETAILED)}
                for number, record in enumerate(recent, first)
            ],
        }

    async def _jobs(self) -> dict[str, Any] | None:
        """How many jobs there are; None where they cannot be counted."""
        if (administration := self._gateway.jobs.administration) is None:
            return None
        try:
            counts = await administration.counts()
        except JobStoreError:
            return None
        return {"statuses": counts.statuses, "deliveries": counts.deliveries}


def _batch(record: BatchRecord, clock_s: float, *, is_detailed: bool) -> dict[str, Any]:
    told = {
        "at": clock_s + record.formed_s,
        "priority": record.priority,
        "reason": record.reason,
        "count": record.count,
        "failed": record.failed,
        "requeued": record.requeued,
        "real_tokens": record.real_tokens,
        "padded_tokens": record.padded_tokens,
        "bulk": len(record.waits_s.get(Priority.BULK, ())),
        "total_s": record.total_s,
        "measured_s": record.measured_s,
        "predicted_s": record.predicted_s,
        "device": record.device,
        "traces": [tag[3:35] for tag in record.tags if tag.startswith(PAGE_TRACES, 3)],
    }
    if is_detailed:
        lanes = [record.priority, *(lane for lane in Priority if lane is not record.priority)]
        waits_s = [(lane, wait_s) for lane in lanes for wait_s in record.waits_s.get(lane, ())]
        told["requests"] = [
            (lane, size, round(wait_s, 6)) for (lane, wait_s), size in zip(waits_s, record.sizes, strict=True)
        ]
    return told
