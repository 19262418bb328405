"""What stands for Modal between a web process and a container: the calls of a real service, run in this event loop."""

import itertools
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import anyio
from modal._runtime.execution_context import _set_current_context_ids

from modalkit.pipelines import InferencePipeline
from modalkit.service.errors import describe_error
from modalkit.service.on_modal.ledger import CallLedger
from modalkit.service.on_modal.remote import CallResult, CallState, ModalRemoteService
from modalkit.service.on_modal.service import ModalService

FORGOTTEN = CallResult(CallState.FORGOTTEN, error="its result was kept for seven days")


@dataclass
class SpawnedCall:
    """A call and what became of it. It has ended once `ended` is set."""

    entries: list[Any]
    options: dict[str, Any]
    result: CallResult = field(default_factory=lambda: CallResult(CallState.PENDING))
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: anyio.Event = field(default_factory=anyio.Event)

    def end(self, result: CallResult) -> None:
        """Give it its result, if it has none."""
        if not self.ended.is_set():
            self.result = result
            self.ended.set()


class ModalInProcess:
    """Calls ``process_request`` of a running service as Modal does, and keeps the calls; both sides of `Calls`.

    What travels is pickled, both ways. A spawned call runs in a task of its own, knows its id, returns once, and is
    cancelled only until it returns. `failure` is raised in place of the next calls; `may_call` holds them up.
    """

    def __init__(self, service: ModalService) -> None:
        self.remote = ModalRemoteService(_Function(self))
        self.service = service
        self.lists: list[list[Any]] = []
        self.options: list[dict[str, Any]] = []
        self.calls: dict[str, SpawnedCall] = {}
        self.failure: Exception | None = None
        self.may_call = anyio.Event()
        self.may_call.set()
        self._ids = map("fc-01J{:06d}".format, itertools.count())
        self._exit_stack = AsyncExitStack()

    @property
    def ledger(self) -> CallLedger:
        """What the container and those who call it agree on."""
        return self.service.running()._ledger  # noqa: SLF001  # on Modal both find it by its name

    @property
    def pipeline(self) -> InferencePipeline:
        """What runs in the container."""
        return self.service.running().worker.pipeline

    async def __aenter__(self) -> Self:
        self._task_group = await self._exit_stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._task_group.cancel_scope.cancel()
        return await self._exit_stack.__aexit__(exc_type, exc, traceback)

    async def run(self, input_list: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Run a list and wait for it, as ``.remote`` does."""
        self.lists.append(list(input_list))
        self.options.append(options)
        await self.may_call.wait()
        if self.failure is not None:
            raise _travelled(self.failure)
        return await self._in_container(next(self._ids), list(input_list), options)

    async def spawn(self, input_list: Sequence[Any], **options: Any) -> str:
        """Have a list run, and return the id of the call, as ``.spawn`` does."""
        await self.may_call.wait()
        if self.failure is not None:
            raise _travelled(self.failure)
        call_id = next(self._ids)
        self.calls[call_id] = SpawnedCall(list(input_list), options)
        self._task_group.start_soon(self._run_spawned, call_id)
        return call_id

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """See `Calls.result`."""
        call = self.calls.get(call_id)
        if call is None:
            return CallResult(CallState.UNKNOWN)
        with anyio.move_on_after(wait_s):
            await call.ended.wait()
        return call.result

    async def cancel(self, call_id: str) -> None:
        """See `Calls.cancel`. One that has returned stays as it is."""
        call = self.calls[call_id]
        call.end(CallResult(CallState.CANCELLED, error="RemoteError: it was cancelled"))
        call.scope.cancel()

    def forget(self, job_id: str) -> None:
        """Let the result of the call expire."""
        self.calls[job_id.partition(".")[0]].result = FORGOTTEN

    async def _run_spawned(self, call_id: str) -> None:
        call = self.calls[call_id]
        with call.scope:
            try:
                outcomes = await self._in_container(call_id, call.entries, call.options)
            except Exception as error:  # noqa: BLE001  # it is what became of the call
                call.end(CallResult(CallState.FAILED, error=describe_error(error)))
            else:
                call.end(CallResult(CallState.RETURNED, outcomes))

    async def _in_container(self, call_id: str, entries: list[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        # As Modal's runtime does for each input; of this task alone, for these are context variables.
        leave = _set_current_context_ids([f"in-{call_id}"], [call_id], ["attempt"])
        try:
            process: Any = self.service.process_request  # to its types a Function, which it is only once registered
            outcomes: list[dict[str, Any]] = await process(_travelled(entries), **_travelled(dict(options)))
            return cast("list[dict[str, Any]]", _travelled(outcomes))
        except Exception as error:  # noqa: BLE001  # it is raised again, as it arrives
            raise _travelled(error) from None
        finally:
            leave()


class _Function:
    """The handle of ``process_request`` that a client has."""

    def __init__(self, calls: ModalInProcess) -> None:
        self.remote = _Method(calls.run)
        self.spawn = _Method(self._spawn)
        self._calls = calls

    async def _spawn(self, input_list: Sequence[Any], **options: Any) -> "_Call":
        return _Call(await self._calls.spawn(input_list, **options))


@dataclass
class _Method:
    aio: Any


@dataclass
class _Call:
    object_id: str


def _travelled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  # Modal does it, and these are our own bytes
