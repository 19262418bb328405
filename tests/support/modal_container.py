"""Modal's own runtime objects of a container, in the process of a test, with what they tell Modal written down."""

import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from modal._partial_function import _find_callables_for_obj, _PartialFunctionFlags
from modal._runtime.container_io_manager import _ContainerIOManager
from modal._runtime.execution_context import _set_current_context_ids
from modal._runtime.task_lifecycle_manager import _TaskLifecycleManager
from modal.client import _Client
from modal_proto import api_pb2


@dataclass
class ModalStub:
    """Modal, as far as a container that takes itself out of rotation needs it."""

    stops: list[tuple[str, bool]] = field(default_factory=list)
    failure: Exception | None = None

    async def ContainerStop(self, request: Any, **_: Any) -> None:  # noqa: N802  # its name
        self.stops.append((request.task_id, request.graceful))
        if self.failure is not None:
            raise self.failure


class _OfflineClient(_Client):
    def __init__(self, stub: ModalStub) -> None:
        self._modal = stub

    @property
    def _stub(self) -> Any:
        return self._modal  # and no connection


@contextmanager
def in_a_container(*, max_inputs: int = 1, is_server: bool = False) -> Iterator[ModalStub]:
    """Make this process a container, to Modal's client: of a function or class, or of a server, which has no inputs."""
    stub = ModalStub()
    function_def = api_pb2.Function(max_concurrent_inputs=max_inputs, is_server=is_server)
    client, thresholds = _OfflineClient(stub), gc.get_threshold()
    try:
        if is_server:
            _TaskLifecycleManager("ta-1", "fu-1", function_def, None, client)
        else:
            _ContainerIOManager(api_pb2.ContainerArguments(task_id="ta-1", function_def=function_def), client)
        yield stub
    finally:
        _ContainerIOManager._reset_singleton()  # type: ignore[no-untyped-call]  # noqa: SLF001  # no other way, as below
        _TaskLifecycleManager._reset_singleton()  # noqa: SLF001
        gc.set_threshold(*thresholds)  # a service sets the collector for the life of its container


@contextmanager
def an_input(call_id: str) -> Iterator[None]:
    """Let this task run an input of a call."""
    reset = _set_current_context_ids([f"in-{call_id}"], [call_id], ["attempt"])
    try:
        yield
    finally:
        reset()


async def run_hooks(instance: object, flag: _PartialFunctionFlags) -> int:
    """Run those hooks of an instance that Modal would, each as it finds it; returns how many there are."""
    hooks = _find_callables_for_obj(instance, flag)
    for hook in hooks.values():
        await hook()
    return len(hooks)


@asynccontextmanager
async def as_modal_runs_it(instance: object) -> AsyncIterator[int]:
    """Enter and leave an instance by its hooks; gives how many of them run before a snapshot."""
    before = await run_hooks(instance, _PartialFunctionFlags.ENTER_PRE_SNAPSHOT)
    await run_hooks(instance, _PartialFunctionFlags.ENTER_POST_SNAPSHOT)
    try:
        yield before
    finally:
        await run_hooks(instance, _PartialFunctionFlags.EXIT)
