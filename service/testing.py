"""For tests of a user's own pipelines and applications: without a port, and without waiting for a clock."""

import inspect
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import httpx
from pydantic import BaseModel
from starlette.applications import Starlette

from modalkit.pipelines import InferencePipeline
from modalkit.pipelines.inference_pipeline import has_own
from modalkit.service.errors import describe_value
from modalkit.service.jobs import MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.loading import ModelSource
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend, QueueBackend
from modalkit.service.settings import Settings, deep_merge
from modalkit.service.web import create_app, lifespan_of
from modalkit.service.worker import InferenceWorker

SWEEP_INTERVAL_S = 0.01
"""Seconds between two looks for jobs that have expired, so that a test that moves its clock does not wait."""

_PLACEHOLDER = "modalkit.inference_pipeline:InferencePipeline"
_FOR_TESTS: dict[str, Any] = {
    "async_config": {"store": "memory"},
    "auth_config": {"api_key": None, "ssm_key": None},
    "batch_config": {"calibration": {"enabled": False}},
}

P = ParamSpec("P")
T = TypeVar("T")
PipelineT = TypeVar("PipelineT", bound=InferencePipeline)


class FakeClock:
    """A clock that stands still until the test moves it. It is called for the time, as `time.time` is."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now
        """Wall-clock Unix seconds."""

    def __call__(self) -> float:
        """The time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock forward by so many seconds."""
        self.now += seconds


def poisoned(
    pipeline_class: type[PipelineT], matches: Callable[[Any], bool], error: Exception | None = None
) -> type[PipelineT]:
    """A subclass that raises `error` for each batch with an item for which `matches` is true.

    A worker then fails these items alone, and runs the others again: this shows what your program does with an item
    that fails. The error is a ValueError unless another one is given.
    """
    _ensure_class("poisoned", pipeline_class)
    raised = ValueError("this item is poisoned") if error is None else error
    entrances = ("predict_stream", "run_inference")
    name = next((name for name in entrances if has_own(pipeline_class, name)), "preprocess")
    method: Callable[..., Any] = getattr(pipeline_class, name)

    def refuse(items: list[BaseModel]) -> None:
        if any(map(matches, items)):
            raise raised

    def call(self: InferencePipeline, input_list: list[BaseModel]) -> Any:
        refuse(input_list)
        return method(self, input_list)

    async def call_later(self: InferencePipeline, input_list: list[BaseModel]) -> Any:
        return await call(self, input_list)

    async def steps_later(self: InferencePipeline, input_list: list[BaseModel]) -> AsyncGenerator[Any]:
        async with aclosing(call(self, input_list)) as steps:
            async for step in steps:
                yield step

    is_stream, is_later = inspect.isasyncgenfunction(method), inspect.iscoroutinefunction(method)
    methods: dict[str, Any] = {name: steps_later if is_stream else call_later if is_later else call}
    return type(f"Poisoned{pipeline_class.__name__}", (pipeline_class,), {"__module__": __name__, **methods})


class Opened(AbstractAsyncContextManager[T], Generic[T]):
    """What `worker_of` and `client_of` return. Only ``async with`` gives the worker, or the client."""

    def __init__(self, manager: AbstractAsyncContextManager[T], name: str) -> None:
        self._manager = manager
        self._name = name

    async def __aenter__(self) -> T:
        return await self._manager.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._manager.__aexit__(kind, error, traceback)

    def __getattr__(self, name: str) -> Any:
        given = self._name.removesuffix("_of")
        raise AttributeError(f"no {name} before the {given} is open: async with {self._name}(...) as {given}: ...")


def _opened(function: Callable[P, AsyncGenerator[T]]) -> Callable[P, Opened[T]]:
    manager = asynccontextmanager(function)

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Opened[T]:
        return Opened(manager(*args, **kwargs), function.__name__)

    return make


def _ensure_class(function: str, found: object) -> None:
    if not (isinstance(found, type) and issubclass(found, InferencePipeline)):
        raise TypeError(f"{function} takes a subclass of InferencePipeline, not {describe_value(found)}")


@_opened
async def worker_of(
    pipeline_class: type[InferencePipeline],
    *,
    model_name: str = "model",
    app_settings: Mapping[str, Any] | None = None,
    common: Mapping[str, Any] | None = None,
    queue_backend: QueueBackend | None = None,
    clock: Callable[[], float] | None = None,
    **entry: Any,
) -> AsyncGenerator[InferenceWorker]:
    """A worker of this pipeline, without a configuration file; leaving the context finishes what was accepted.

    `entry` has the keys that the model has in ``model_settings.model_entries``, `common` those of
    ``model_settings.common``, and `app_settings` those of that section, all of which have their defaults, except that
    jobs are kept in memory and no costs are measured. Neither files nor variables are read. Results of jobs go to the
    `queue_backend`. Jobs take the time from `clock`.

    Raises `SettingsError` for what a configuration may not have, and `LoadError` for a pipeline that cannot be made.
    """
    _ensure_class("worker_of", pipeline_class)
    settings = Settings(
        _config_files=[],
        _environ={},
        app_settings=deep_merge(_FOR_TESTS, app_settings or {}),
        model_settings={
            "local_model_repository_folder": ".",
            "common": dict(common or {}),
            "model_entries": {model_name: {"pipeline": _PLACEHOLDER, **entry}},
        },
    )
    source = ModelSource(settings, model_name, pipeline_class)
    queue_config, async_config = settings.app_settings.queue_config, settings.app_settings.async_config
    manager = JobManager(
        MemoryJobStore(max_jobs=async_config.max_stored_jobs),
        queue_backend,
        allowed_queues=queue_config.allowed_queues,
        result_ttl_s=async_config.result_ttl,
        max_delivery_attempts=async_config.max_delivery_attempts,
        sweep_interval_s=SWEEP_INTERVAL_S,
        clock=clock,
    )
    async with (
        manager as jobs,
        InferenceWorker(source.load(), settings=settings, jobs=jobs, input_model=source.input_model) as worker,
    ):
        yield worker


@_opened
async def client_of(
    served: Path | str | LocalGateway | Starlette,
    *,
    queue_backend: QueueBackend | None = None,
) -> AsyncGenerator[httpx.AsyncClient]:
    """An HTTP client for a service in this process, without a port; leaving the context ends the service.

    `served` is an application (its lifespan runs meanwhile), a gateway that is not open yet, or the path of a
    configuration file. With a gateway or a file, the models are ready when the client is given. A service from a file
    asks for no API key, keeps its jobs in memory, measures no costs, reads no variables, and sends the results of jobs
    to the `queue_backend`, by default one in memory.

    It needs asyncio. An exception that the application does not answer is raised by the request. Answers arrive as a
    whole, streams too, and the client never disconnects: that takes a server. Raises what loading the models raises.
    """
    if isinstance(served, Path | str):
        settings = Settings(_config_files=[os.fspath(served)], _environ={}, app_settings=_FOR_TESTS)
        served = LocalGateway(settings, queue_backend=InMemoryBackend() if queue_backend is None else queue_backend)
    async with AsyncExitStack() as stack:
        if isinstance(served, LocalGateway):
            await stack.enter_async_context(served)
            await served.wait_until_ready()
            app: Starlette = create_app(served, owns_gateway=False)
        elif isinstance(served, Starlette):
            app = served
        else:
            raise TypeError(
                "client_of takes the path of a configuration, a LocalGateway or an application, not "
                f"{describe_value(served)}; worker_of takes a pipeline"
            )
        await stack.enter_async_context(lifespan_of(app)(None))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver", timeout=60)
        yield await stack.enter_async_context(client)
