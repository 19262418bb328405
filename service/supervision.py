"""Loads the pipeline of a model: at the start, beside one that runs, and again where that one hangs."""

import gc
import logging
import math
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio

from modalkit.batching.task_groups import plain_task_group
from modalkit.batching.threads import DedicatedThread
from modalkit.pipelines import InferencePipeline
from modalkit.pipelines.memory import free_bytes, private_bytes
from modalkit.service.device_process import DevicePipeline, load_on_devices
from modalkit.service.errors import (
    InvalidItemError,
    NotReadyError,
    Readiness,
    ReloadError,
    ServiceError,
    describe_error,
)
from modalkit.service.loading import ModelSource
from modalkit.service.settings import BatchConfig
from modalkit.service.validation import summary, validated
from modalkit.service.worker import InferenceWorker

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESTART_INTERVAL_S = 600.0
"""A model that hangs again within so many seconds after it was restarted is not restarted once more."""
RESTART_TIMEOUT_S = 300.0
"""Seconds within which a model that hangs has to be loaded anew."""
CHECK_INTERVAL_S = 0.5
"""Seconds between two checks for a worker that hangs."""


class ModelBrokenError(ServiceError):
    """Raised inside the gateway, and logged, for a model that was ready and can run nothing any more."""

    def __init__(self, model_name: str, problem: str) -> None:
        super().__init__(f"model {model_name!r} broke down: {problem}; it takes no requests, restart this process")
        self.model_name = model_name


@dataclass
class GatewayState:
    """What the models of a gateway share: whether it ends, and how many of them load."""

    draining: anyio.Event = field(default_factory=anyio.Event)
    """Set before the gateway closes: no model is reloaded any more."""
    closing: anyio.Event = field(default_factory=anyio.Event)
    loading: int = 0
    loads: int = 0
    """How often one began to load."""


class Supervisor:
    """Loads the pipeline of one model, replaces it on reload, and restarts it where it hangs."""

    def __init__(self, source: ModelSource, state: GatewayState) -> None:
        self.source = source
        """What the pipeline that runs was loaded from."""
        self._name = source.model_name
        self._state = state
        self._changing = anyio.Lock()
        self._loaded_bytes = 0  # memory that the pipeline took when it was loaded; 0 where that is not known

    async def load(self) -> list[InferencePipeline] | None:
        """The first pipeline, on each of its devices, or None when the gateway closes before. Raises `LoadError`."""
        return await _unless(self._state.closing.wait, lambda: self._load(self.source))

    def check(self, source: ModelSource) -> None:
        """Raise `ReloadError` for a source that takes other requests, or gives other results, than the present one."""
        if (source.input_model, source.output_model) != (self.source.input_model, self.source.output_model):
            raise ReloadError(self._name, "its input_model or output_model has changed; restart the service")

    async def reload(self, worker: InferenceWorker, source: ModelSource) -> None:
        """Let the worker run its next batches by a pipeline of `source`; see `LocalGateway.reload`."""
        async with self._one_change():
            self.check(source)
            limits = source.settings.app_settings.batch_config
            await self._replace(worker, source, limits, self._state.draining)
            if gc.get_freeze_count():
                gc.freeze()  # the objects of the new one, too
            logger.info("Model %r was reloaded", self._name)

    async def set_limits(self, worker: InferenceWorker, limits: Mapping[str, Any]) -> None:
        """Change limits of the worker's batches, keys of `batch_config`. Raises `InvalidItemError`, `ReloadError`."""
        async with self._one_change():
            if "calibration" in limits:
                error = {"field": "calibration", "message": "is for the start; change it in the configuration"}
                raise InvalidItemError(summary([error]), [error])
            await worker.set_limits(validated(BatchConfig, {**worker.limits.model_dump(), **limits}))

    async def watch(self, worker: InferenceWorker) -> None:
        """Wait until the gateway closes. Restart a model that hangs; raises `ModelBrokenError` for one that is lost."""
        restarted_s = -math.inf
        while not self._state.closing.is_set():
            with anyio.move_on_after(CHECK_INTERVAL_S):
                await _unless(worker.wait_until_broken, self._state.closing.wait)
            if (problem := worker.problem) is None or self._state.closing.is_set():
                continue
            if not worker.hangs:
                raise ModelBrokenError(self._name, problem)
            if anyio.current_time() < restarted_s + RESTART_INTERVAL_S:
                raise ModelBrokenError(self._name, f"{problem}, again after it was restarted")
            restarted_s = anyio.current_time()
            await self._restart(worker, problem)

    async def _restart(self, worker: InferenceWorker, problem: str) -> None:
        logger.error("Model %r: %s; it is loaded anew", self._name, problem)
        try:
            with anyio.fail_after(RESTART_TIMEOUT_S):
                async with self._changing:
                    await self._replace(worker, self.source, worker.limits, self._state.closing)
        except Exception as error:
            if not self._state.closing.is_set():
                why_not = describe_error(error)
                raise ModelBrokenError(self._name, f"{problem}, and it was not loaded anew ({why_not})") from error
        else:
            logger.error("Model %r was restarted", self._name)

    @asynccontextmanager
    async def _one_change(self) -> AsyncGenerator[None]:
        if self._changing.locked():
            raise ReloadError(self._name, "it is being reloaded already; try again later")
        async with self._changing:
            yield

    async def _replace(
        self, worker: InferenceWorker, source: ModelSource, limits: BatchConfig, stopping: anyio.Event
    ) -> None:
        """Load the model of `source`, and let it run the worker's next batches, unless `stopping` is set before."""
        free = free_bytes()
        if free is not None and free < self._loaded_bytes:
            raise ReloadError(
                self._name,
                f"it needs {self._loaded_bytes >> 20} MiB beside the old one and {free >> 20} MiB of memory are free; "
                "restart the service instead",
            )

        async def replace() -> bool:
            await worker.replace(await self._load(source), limits)
            return True

        if not await _unless(stopping.wait, replace):
            raise NotReadyError(self._name, Readiness.DRAINING)
        self.source = source

    async def _load(self, source: ModelSource) -> list[InferencePipeline]:
        """The pipeline, loaded on each of its devices. When cancelled, what is being loaded is abandoned.

        The processes of devices end then, too, once they have loaded.
        """
        state = self._state
        is_alone, state.loading = not state.loading, state.loading + 1
        state.loads += 1
        load, used = state.loads, private_bytes()
        thread, is_abandoned = DedicatedThread(f"load {self._name}"), threading.Event()

        def load_unless_abandoned() -> list[InferencePipeline]:
            pipelines = load_on_devices(source)
            for pipeline in pipelines:
                if is_abandoned.is_set() and isinstance(pipeline, DevicePipeline):
                    pipeline.close()
            return pipelines

        try:
            pipelines = await thread.run(load_unless_abandoned)
        except BaseException:
            is_abandoned.set()
            raise
        finally:
            thread.close()
            state.loading -= 1
        if is_alone and state.loads == load:  # else what others loaded meanwhile is counted too
            self._loaded_bytes = max(0, private_bytes() - used)
        return pipelines


async def _unless(stopped: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[T]]) -> T | None:
    """Await `call` and return its result; cancel it and return None when `stopped` returns before."""
    async with plain_task_group() as task_group:

        async def watch() -> None:
            await stopped()
            task_group.cancel_scope.cancel()

        task_group.start_soon(watch)
        result = await call()
        task_group.cancel_scope.cancel()
        return result
    return None
