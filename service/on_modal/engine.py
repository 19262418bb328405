"""Modal as an engine: carries calls to the containers of a service class, keeps them, and keeps what they share."""

import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

import anyio
import modal
import modal.exception
import modal.experimental
from anyio import AsyncContextManagerMixin
from grpclib.exceptions import StreamTerminatedError
from modal.types import InputInfo, InputStatus

from modalkit.service.calls.engine import CallOptions, CallResult, CallState
from modalkit.service.calls.published_metrics import PublishedMetrics
from modalkit.service.calls.records import CallRecords
from modalkit.service.errors import (
    NotAvailableError,
    RemoteCallError,
    RemoteTimeoutError,
    ServiceError,
    describe_error,
)
from modalkit.service.jobs import JobStoreError
from modalkit.service.on_modal.config import ModalConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

STORE_RETRIES_S = 30.0
"""Seconds for which an operation of the key-value store is tried again: a container's call would fail with its jobs."""
STORE_RETRY_S = 1.0

_CALL_ID = re.compile(r"fc-[0-9A-Za-z]+")
_UNREACHABLE = (
    modal.exception.ConnectionError,
    modal.exception.InternalError,
    modal.exception.ServiceError,
    StreamTerminatedError,
)

Connect = Callable[[], Awaitable[Any]]
"""Finds the method ``process_request`` of an instance of a service class."""


class ModalEngine(AsyncContextManagerMixin):
    """A `CallClient` and a `CallQueue` over Modal. Opened, it can call the models that it was given a connection to.

    It tells errors of a call from those of Modal's client by their classes: everything that leaves a container is a
    `ServiceError` (see `only_service_errors`), and Modal's client raises none.
    """

    def __init__(self, connections: Mapping[str, Connect]) -> None:
        self._connections = connections
        self._methods: dict[str, Any] = {}

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        self._methods = {name: await connect() for name, connect in self._connections.items()}
        yield self

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        """Run a call and wait for it. Raises `RemoteCallError` and `ContainerFaultError`."""
        try:
            outcomes: Sequence[Mapping[str, Any]] = await self._methods[model_name].remote.aio(
                entries, **options.arguments()
            )
        except ServiceError:
            raise
        except modal.exception.FunctionTimeoutError as error:
            raise RemoteTimeoutError(f"the call took longer than deployment_config.timeout: {error}") from error
        except Exception as error:
            raise RemoteCallError(f"the call to Modal failed: {describe_error(error)}") from error
        return outcomes

    async def enqueue(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> str:
        """Have Modal keep and run a call; returns its id. Raises `RemoteCallError` and `NotAvailableError`."""
        if model_name not in self._methods:
            raise NotAvailableError(
                "jobs run as Modal's calls here: this server takes no jobs: give it job_service, a service class that "
                "runs them"
            )
        try:
            call = await self._methods[model_name].spawn.aio(entries, **options.arguments())
        except Exception as error:
            raise RemoteCallError(f"Modal did not accept the call: {describe_error(error)}") from error
        return str(call.object_id)

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """The state of a call, once it has ended or `wait_s` seconds have passed. Raises `RemoteCallError`."""
        if not _CALL_ID.fullmatch(call_id):
            return CallResult(CallState.UNKNOWN)
        call: modal.FunctionCall[Any] = modal.FunctionCall.from_id(call_id)
        try:
            return CallResult(CallState.RETURNED, await call.get.aio(timeout=wait_s))
        except (ServiceError, ImportError, modal.exception.InternalFailure) as error:
            return CallResult(CallState.FAILED, error=describe_error(error))
        except modal.exception.RemoteError as error:
            # Modal raises the same for a call that was cancelled and one that failed; the status of its input differs.
            state = CallState.CANCELLED if await _was_cancelled(call) else CallState.FAILED
            return CallResult(state, error=describe_error(error))
        except modal.exception.FunctionTimeoutError as error:
            return CallResult(CallState.TIMED_OUT, error=f"it took longer than deployment_config.timeout: {error}")
        except TimeoutError:  # Python's own: Modal's do not derive from it
            return CallResult(CallState.PENDING)
        except modal.exception.OutputExpiredError:
            return CallResult(CallState.FORGOTTEN, error="its result was kept for seven days")
        except (modal.exception.NotFoundError, modal.exception.InvalidError):
            return CallResult(CallState.UNKNOWN)
        except Exception as error:
            raise RemoteCallError(f"Modal could not be asked: {describe_error(error)}") from error

    async def cancel(self, call_id: str) -> None:
        """End a call that has not ended. Raises `RemoteCallError`."""
        try:
            await modal.FunctionCall.from_id(call_id).cancel.aio()
        except Exception as error:
            raise RemoteCallError(f"Modal could not cancel the call: {describe_error(error)}") from error


async def _was_cancelled(call: "modal.FunctionCall[Any]") -> bool:
    try:
        graph = await call.get_call_graph.aio()
    except modal.exception.Error:
        return False  # it failed, for all that is known
    return any(
        entry.function_call_id == call.object_id and entry.status is InputStatus.TERMINATED for entry in _inputs(graph)
    )


def _inputs(graph: Iterable[InputInfo]) -> Iterator[InputInfo]:
    """All inputs of a call graph, which begins with the one that made the call: that of a web container."""
    for entry in graph:
        yield entry
        yield from _inputs(entry.children)


class ModalKeyValueStore:
    """A `modal.Dict`, which forgets entries that were not used for seven days, as Modal does with results.

    Raises `JobStoreError` when it cannot be reached for `STORE_RETRIES_S` seconds, or refuses.
    """

    def __init__(self, name: str) -> None:
        self._dict = modal.Dict.from_name(name, create_if_missing=True)

    async def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        return await _with_retries(lambda: self._dict.get.aio(key))

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Write a value; returns whether it was written."""
        return await _with_retries(lambda: self._dict.put.aio(key, value, skip_if_exists=skip_if_exists))

    async def remove(self, key: str) -> None:
        """Remove a key, if it exists."""
        await _with_retries(lambda: self._dict.pop.aio(key, None))

    async def items(self) -> dict[str, Any]:
        """All keys with their values."""
        return await _with_retries(self._items)

    async def _items(self) -> dict[str, Any]:
        return {key: value async for key, value in self._dict.items.aio()}


async def _with_retries(operation: Callable[[], Awaitable[T]]) -> T:
    give_up_at_s = anyio.current_time() + STORE_RETRIES_S
    while True:
        try:
            return await operation()
        except Exception as error:
            problem = f"the app's modal.Dict of jobs could not be reached: {describe_error(error)}"
            if not isinstance(error, _UNREACHABLE) or anyio.current_time() >= give_up_at_s:
                raise JobStoreError(problem) from error
        logger.warning("%s; trying again", problem)
        await anyio.sleep(STORE_RETRY_S)


def open_records(config: ModalConfig) -> CallRecords:
    """The call records that all containers of an app share."""
    return CallRecords(ModalKeyValueStore(f"{config.app_name}-jobs"))


def open_metrics(config: ModalConfig) -> PublishedMetrics:
    """The metrics that all containers of an app publish."""
    return PublishedMetrics(ModalKeyValueStore(f"{config.app_name}-metrics"))


def connection(app_cls: Any, config: ModalConfig, parameters: Mapping[str, Any]) -> Connect:
    """Finds the containers of a class of Modal's, which may be registered here or looked up.

    A class that is not decorated with `modal.concurrent` gets its concurrency here, because otherwise each container
    would run one call at a time.
    """

    async def connect() -> Any:
        instance = app_cls(**parameters)
        if not await _is_concurrent(instance.process_request):
            instance = app_cls.with_concurrency(**_concurrency(config))(**parameters)
            if config.app_settings.deployment_config.min_containers:
                logger.warning(
                    "min_containers keeps containers warm that these requests do not reach: decorate the class, below "
                    "@app.cls(...), with @modal.concurrent(**modal_config.get_concurrency_settings())"
                )
        return instance.process_request

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
        settings.pop("target_inputs")  # the inputs that this web container makes are no lists, but single items
    return settings


def takes_one_input_at_a_time() -> bool:
    """Whether this is a container of a function or class that is not decorated with `modal.concurrent`."""
    if modal.is_local():
        return False
    try:
        concurrency: int = modal.experimental.get_local_input_concurrency()  # type: ignore[no-untyped-call]  # Modal's
    except (AssertionError, AttributeError):  # a server has no inputs; Modal only asserts that there are some
        return False
    return concurrency == 1
