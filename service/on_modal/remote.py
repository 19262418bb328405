"""A service class of Modal's, called from elsewhere: its errors and Modal's in our words."""

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import modal
import modal.exception
from grpclib.exceptions import StreamTerminatedError
from modal.types import InputInfo, InputStatus

from modalkit.service.errors import ContainerFaultError, RemoteCallError, RemoteTimeoutError, describe_error

_NOT_ASKED = (
    modal.exception.AuthError,
    modal.exception.ClientClosed,
    modal.exception.ConnectionError,
    modal.exception.InternalError,
    modal.exception.PermissionDeniedError,
    modal.exception.ResourceExhaustedError,
    modal.exception.ServiceError,
    modal.exception.UnimplementedError,
    modal.exception.VersionError,
    StreamTerminatedError,
)
"""What says nothing of a call, but of the question."""


class CallState(StrEnum):
    """Where a spawned call is in its life."""

    PENDING = "pending"
    RETURNED = "returned"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"
    FORGOTTEN = "forgotten"
    """It was there, but its result was kept no longer."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CallResult:
    """What became of a spawned call, with its outcomes once it `returned`."""

    state: CallState
    outcomes: Sequence[Mapping[str, Any]] = ()
    error: str | None = None


class RemoteService(Protocol):
    """A service somewhere that runs lists; see `ModalService.process_request` for the options."""

    async def process(self, input_list: Sequence[Any], **options: Any) -> Sequence[Mapping[str, Any]]:
        """Run a list and wait for it. Raises `RemoteCallError` and `ContainerFaultError`."""
        ...  # a protocol method has no body

    async def spawn(self, input_list: Sequence[Any], **options: Any) -> str:
        """Have a list run, and return the id of the call. Raises `RemoteCallError`."""
        ...


class Calls(Protocol):
    """The calls that were spawned, whoever did."""

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """What became of a call, within `wait_s` seconds. Raises `RemoteCallError`."""
        ...

    async def cancel(self, call_id: str) -> None:
        """End a call that has not ended. Raises `RemoteCallError`."""
        ...


class ModalRemoteService:
    """Calls ``process_request`` of an instance of a registered class, or of one that was looked up."""

    def __init__(self, process_request: Any) -> None:
        self._process_request = process_request

    async def process(self, input_list: Sequence[Any], **options: Any) -> Sequence[Mapping[str, Any]]:
        """See `RemoteService.process`."""
        try:
            outcomes: Sequence[Mapping[str, Any]] = await self._process_request.remote.aio(input_list, **options)
        except ContainerFaultError:
            raise
        except modal.exception.FunctionTimeoutError as error:
            raise RemoteTimeoutError(f"the call took longer than deployment_config.timeout: {error}") from error
        except Exception as error:
            raise RemoteCallError(f"the call to Modal failed: {describe_error(error)}") from error
        return outcomes

    async def spawn(self, input_list: Sequence[Any], **options: Any) -> str:
        """See `RemoteService.spawn`."""
        try:
            call = await self._process_request.spawn.aio(input_list, **options)
        except Exception as error:
            raise RemoteCallError(f"Modal did not accept the call: {describe_error(error)}") from error
        return str(call.object_id)


class ModalCalls:
    """Asks Modal for the calls that it keeps."""

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """See `Calls.result`."""
        call: modal.FunctionCall[Any] = modal.FunctionCall.from_id(call_id)
        try:
            return CallResult(CallState.RETURNED, await call.get.aio(timeout=wait_s))
        except modal.exception.FunctionTimeoutError as error:
            return CallResult(CallState.TIMED_OUT, error=f"it took longer than deployment_config.timeout: {error}")
        except modal.exception.RemoteError as error:
            # Of a call that was cancelled Modal says no more than of one that failed; the status of its input does.
            state = CallState.CANCELLED if await self._was_cancelled(call) else CallState.FAILED
            return CallResult(state, error=describe_error(error))
        except Exception as error:  # noqa: BLE001  # the call may have raised anything
            return _failed(error) if _came_from_the_call(error) else _without_result(error)

    async def cancel(self, call_id: str) -> None:
        """See `Calls.cancel`."""
        try:
            await modal.FunctionCall.from_id(call_id).cancel.aio()
        except Exception as error:
            raise RemoteCallError(f"Modal could not cancel the call: {describe_error(error)}") from error

    async def _was_cancelled(self, call: "modal.FunctionCall[Any]") -> bool:
        try:
            graph = await call.get_call_graph.aio()
        except modal.exception.Error:
            return False  # it is the best that can be known
        return any(
            entry.function_call_id == call.object_id and entry.status is InputStatus.TERMINATED
            for entry in _inputs(graph)
        )


def _came_from_the_call(error: Exception) -> bool:
    """Whether an error, of any class, was raised in a container: Modal's client raises it again as it reads the result.

    Not so what it raises when it cannot download a long one.
    """
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "_process_result" in functions and "blob_download" not in functions


def _without_result(error: Exception) -> CallResult:
    """What it says of a call that Modal's client raised this. Raises `RemoteCallError` where it says nothing."""
    if isinstance(error, TimeoutError):  # Python's own: none of Modal's derives from it
        return CallResult(CallState.PENDING)
    if isinstance(error, modal.exception.OutputExpiredError):
        return CallResult(CallState.FORGOTTEN, error="its result was kept for seven days")
    if isinstance(error, modal.exception.NotFoundError | modal.exception.InvalidError):
        return CallResult(CallState.UNKNOWN)
    if isinstance(error, _NOT_ASKED):
        raise RemoteCallError(f"Modal could not be asked: {describe_error(error)}") from error
    return _failed(error)


def _failed(error: Exception) -> CallResult:
    return CallResult(CallState.FAILED, error=describe_error(error))


def _inputs(graph: Iterable[InputInfo]) -> Iterator[InputInfo]:
    """All of a call graph, which begins with whoever made the call: the web container's own input."""
    for entry in graph:
        yield entry
        yield from _inputs(entry.children)
