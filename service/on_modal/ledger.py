"""What the doors and the containers have to agree on about the jobs of a call, kept in a dictionary that all can reach.

Modal knows calls, each of which carries many jobs. That one of these was cancelled, what a job that has not ended asked
for, and which job an idempotency key stands for, is written here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from modalkit.service.jobs import IdempotencyKeyReusedError, JobStoreError
from modalkit.service.jobs.model import Job
from modalkit.service.on_modal.call_format import job_object, read_job

RESERVATION_S = 60.0


class Table(Protocol):
    """A dictionary that survives processes: `modal.Dict`, or one in memory. Each operation is atomic."""

    async def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        ...  # a protocol method has no body

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """Write a value; returns whether it was written, which `skip_if_exists` may prevent."""
        ...

    async def remove(self, key: str) -> None:
        """Remove a key that may not be there."""
        ...


class MemoryTable:
    """A table of this process."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    async def get(self, key: str) -> Any:
        """See `Table.get`."""
        return self._values.get(key)

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """See `Table.put`."""
        if skip_if_exists and key in self._values:
            return False
        self._values[key] = value
        return True

    async def remove(self, key: str) -> None:
        """See `Table.remove`."""
        self._values.pop(key, None)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A right to make the one job of an idempotency key."""

    key: str
    digest: str


class CallLedger:
    """Reads and writes the table. Raises what the table raises.

    Cancelling and ending meet like this: whoever cancels writes his mark and then asks whether the call was closed; a
    container closes the call and then asks for marks. So a job that was cancelled before its call was closed has no
    result sent, and one is never told to be cancelled after that.
    """

    def __init__(self, table: Table, *, clock: Callable[[], float] = time.time) -> None:
        self._table = table
        self._clock = clock

    async def record(self, call_id: str, jobs: Sequence[Job]) -> None:
        """Note what the jobs of a call ask for, in the order of its list."""
        await self._table.put(call_id, [job_object(job) for job in jobs])

    async def jobs(self, call_id: str) -> list[Job] | None:
        """What `record` noted, if anything."""
        noted = await self._table.get(call_id)
        return None if noted is None else [read_job(values) for values in noted]

    async def cancel(self, call_id: str, index: int) -> bool:
        """Mark one job of a call as cancelled; returns whether that came in time."""
        await self._table.put(f"{call_id}/marked", True)
        await self._table.put(f"{call_id}/{index}", True)
        if await self._table.get(f"{call_id}/closed") is None:
            return True
        await self._table.remove(f"{call_id}/{index}")  # a call that runs again shall not find it
        return False

    async def cancelled(self, call_id: str, count: int) -> frozenset[int]:
        """Which of the `count` jobs of a call are marked."""
        if await self._table.get(f"{call_id}/marked") is None:
            return frozenset()
        marked: set[int] = set()
        failures: list[JobStoreError] = []

        async def look(index: int) -> None:
            try:
                if await self._table.get(f"{call_id}/{index}"):
                    marked.add(index)
            except JobStoreError as error:
                failures.append(error)  # one of them tells, where a task group would raise a group

        async with anyio.create_task_group() as task_group:
            for index in range(count):
                task_group.start_soon(look, index)
        if failures:
            raise failures[0]
        return frozenset(marked)

    async def is_cancelled(self, call_id: str, index: int) -> bool:
        """Whether one job of a call is marked."""
        return bool(await self._table.get(f"{call_id}/{index}"))

    async def close(self, call_id: str, count: int) -> frozenset[int]:
        """Let no more jobs of a call be cancelled, and return which have been."""
        await self._table.put(f"{call_id}/closed", True, skip_if_exists=True)
        return await self.cancelled(call_id, count)

    async def begin(self, call_id: str) -> int:
        """Count one more run of a call, and return how many that makes: all but the last were cut short."""
        count = 1 + (await self._table.get(f"{call_id}/runs") or 0)
        await self._table.put(f"{call_id}/runs", count)
        return count

    async def crashes(self, call_id: str) -> dict[int, int]:
        """How many runs of a call were cut short while each of its jobs ran alone, by their places."""
        noted: dict[str, Any] = await self._table.get(f"{call_id}/alone") or {"index": None, "crashes": {}}
        crashes: dict[int, int] = dict(noted["crashes"])
        if noted["index"] is not None:
            crashes[noted["index"]] = crashes.get(noted["index"], 0) + 1
        return crashes

    async def run_alone(self, call_id: str, index: int | None, crashes: Mapping[int, int]) -> None:
        """Note which job of a call runs alone from now on, None for none of them, and what `crashes` told before."""
        await self._table.put(f"{call_id}/alone", {"index": index, "crashes": dict(crashes)})

    async def faults(self, call_id: str) -> int:
        """Count one more device that broke under a call, and return how many that makes."""
        count = 1 + (await self._table.get(f"{call_id}/faults") or 0)
        await self._table.put(f"{call_id}/faults", count)
        return count

    async def reserve(self, key: str, digest: str) -> Reservation | str:
        """The right to make the job of an idempotency key, or the id of the one that was made with it.

        `digest` stands for what is asked for. Raises `IdempotencyKeyReusedError` where that was something else, and
        `JobStoreError` while another request with the key is under way, or died within the last minute.
        """
        place = f"key/{key}"
        mine: dict[str, Any] = {"digest": digest, "reserved_at": self._clock()}
        if await self._table.put(place, mine, skip_if_exists=True):
            return Reservation(key, digest)
        theirs: dict[str, Any] = await self._table.get(place) or mine
        if "job_id" in theirs:
            if theirs["digest"] != digest:
                raise IdempotencyKeyReusedError(key, theirs["job_id"])
            return str(theirs["job_id"])
        if self._clock() - theirs["reserved_at"] < RESERVATION_S:
            raise JobStoreError(f"another request with idempotency_key {key!r} is under way; retry in a moment")
        await self._table.put(place, mine)
        return Reservation(key, digest)

    async def keep(self, reservation: Reservation, job_id: str) -> None:
        """Note the job that was made with a reservation."""
        await self._table.put(f"key/{reservation.key}", {"digest": reservation.digest, "job_id": job_id})

    async def give_back(self, reservation: Reservation) -> None:
        """Let another request make the job."""
        await self._table.remove(f"key/{reservation.key}")
