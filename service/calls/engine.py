"""The protocols of an engine, which carries calls between the processes of a service.

A *call* is a list of entries for one model. An entry is an item that its caller waits for, or a job. The frontend makes
calls; a worker runs each of them by a `CallProcessor` and returns one outcome for each entry, as `wire_format` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from modalkit.batching import Priority


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What a call says besides its entries; plain values, as they travel."""

    priority: str | None = None
    """``interactive`` or ``bulk``; None is interactive for items, and bulk for jobs."""
    timeouts_s: Sequence[float | None] | None = None
    """Seconds that each entry has, from when the worker gets the call."""
    accepted_at: float | None = None
    """Wall-clock Unix seconds at which its jobs were accepted; set in calls that a `CallQueue` keeps, and no others."""
    input_model: str | None = None
    """The class that messages are validated as, ``module:Class``, where it is not the one that the worker knows."""
    owners: Sequence[str] | None = None
    """The owner of each job; None where none has one."""
    traceparents: Sequence[str | None] | None = None
    """The trace of each job, as W3C's header has it; None where no job belongs to one."""

    def __post_init__(self) -> None:
        if self.priority is not None:
            Priority(self.priority)  # raises ValueError

    def arguments(self) -> dict[str, Any]:
        """Those that are set, by their names."""
        return {name: value for name, value in vars(self).items() if value is not None}


class CallState(StrEnum):
    """Where a kept call is in its life."""

    PENDING = "pending"
    RETURNED = "returned"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"
    FORGOTTEN = "forgotten"
    """It existed, and its result is no longer kept."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CallResult:
    """The state of a kept call, with its outcomes once it has `returned`, and an error if it ended otherwise."""

    state: CallState
    outcomes: Sequence[Mapping[str, Any]] = ()
    error: str | None = None


class CallClient(Protocol):
    """Calls a worker and waits."""

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        """Run a list of entries by a worker of this model; returns an outcome for each, in their order.

        Raises `RemoteCallError` where no worker returned them, and `ContainerFaultError`.
        """
        ...  # a protocol method has no body


class CallQueue(Protocol):
    """Keeps calls, and has each of them run at least once, until it returns, fails or is cancelled.

    A call whose worker dies runs again. Its outcomes are kept for a time. A call id is made of letters, digits, ``-``
    and ``_``.
    """

    async def enqueue(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> str:
        """Keep a call; returns its id once it is kept. Raises `RemoteCallError`."""
        ...

    async def result(self, call_id: str, wait_s: float) -> CallResult:
        """The state of a call, once it has ended or `wait_s` seconds have passed. Raises `RemoteCallError`."""
        ...

    async def cancel(self, call_id: str) -> None:
        """End a call that has not ended. Raises `RemoteCallError`."""
        ...


class KeyValueStore(Protocol):
    """A dictionary that frontends and workers share, of plain values. Each operation is atomic.

    Raises `JobStoreError` where it cannot be reached.
    """

    async def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        ...

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Write a value; returns whether it was written, which `skip_if_exists` may prevent.

        A write whose answer was lost may be repeated, so the value that prevents it may be the same one.
        """
        ...

    async def remove(self, key: str) -> None:
        """Remove a key, if it exists."""
        ...

    async def items(self) -> dict[str, Any]:
        """All keys with their values."""
        ...


class MemoryKeyValueStore:
    """A key-value store of this process."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    async def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        return self._values.get(key)

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Write a value; returns whether it was written."""
        if skip_if_exists and key in self._values:
            return False
        self._values[key] = value
        return True

    async def remove(self, key: str) -> None:
        """Remove a key, if it exists."""
        self._values.pop(key, None)

    async def items(self) -> dict[str, Any]:
        """All keys with their values."""
        return dict(self._values)
