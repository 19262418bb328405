"""What frontends and workers agree on about the jobs of a call, in a key-value store that all of them reach.

An engine knows calls, each of which carries many jobs. Kept here for each call: what its jobs asked for, which of them
were cancelled, which were running when a worker died, and which job an idempotency key stands for.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Never

import anyio

from modalkit.service.calls.engine import KeyValueStore
from modalkit.service.calls.wire_format import job_object, read_job
from modalkit.service.jobs import IdempotencyKeyReusedError, JobStoreError
from modalkit.service.jobs.model import Job

logger = logging.getLogger(__name__)

RESERVATION_S = 60.0
"""Seconds after which another request may take over an idempotency key that was reserved and not renewed."""
RENEWAL_INTERVAL_S = 15.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request reserves an owner's idempotency key by, to make its job. `digest` stands for what is asked for."""

    key: str
    digest: str
    owner: str = ""
    token: str = field(default_factory=token_hex)
    """Tells this request's reservation from those of others."""

    @property
    def name(self) -> str:
        """The key in the store."""
        # Keys are printable, so no key without an owner is one with an owner.
        return f"key/{self.owner}\n{self.key}" if self.owner else f"key/{self.key}"


class CallRecords:
    """Reads and writes the key-value store. Raises what the store raises.

    Cancelling a job and closing its call are ordered by two writes and two reads. `cancel` writes its mark and then
    asks whether the call is closed; `close` closes the call and then asks for marks. So a job that was cancelled before
    its call was closed has no result sent, and no job is reported as cancelled after that.
    """

    def __init__(self, store: KeyValueStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def record(self, call_id: str, jobs: Sequence[Job]) -> None:
        """Keep what the jobs of a call ask for, in the order of its list."""
        await self._store.put(call_id, [job_object(job) for job in jobs])

    async def jobs(self, call_id: str) -> list[Job] | None:
        """What `record` kept, if anything."""
        recorded = await self._store.get(call_id)
        return None if recorded is None else [read_job(values) for values in recorded]

    async def cancel(self, call_id: str, index: int) -> bool:
        """Mark one job of a call as cancelled; returns False where the call was closed before."""
        await self._store.put(f"{call_id}/marked", True)
        await self._store.put(f"{call_id}/{index}", True)
        if await self._store.get(f"{call_id}/closed") is None:
            return True
        await self._store.remove(f"{call_id}/{index}")  # or a second run of the call would find it
        return False

    async def cancelled(self, call_id: str, count: int) -> frozenset[int]:
        """The indexes of those of the `count` jobs of a call that are marked."""
        if await self._store.get(f"{call_id}/marked") is None:
            return frozenset()
        marked: set[int] = set()
        failures: list[JobStoreError] = []

        async def look(index: int) -> None:
            try:
                if await self.is_cancelled(call_id, index):
                    marked.add(index)
            except JobStoreError as error:
                failures.append(error)  # raised below: a task group would raise a group

        async with anyio.create_task_group() as task_group:
            for index in range(count):
                task_group.start_soon(look, index)
        if failures:
            raise failures[0]
        return frozenset(marked)

    async def is_cancelled(self, call_id: str, index: int) -> bool:
        """Whether one job of a call is marked."""
        return bool(await self._store.get(f"{call_id}/{index}"))

    async def close(self, call_id: str, count: int) -> frozenset[int]:
        """Let no more jobs of a call be cancelled, and return the indexes of those that have been."""
        await self._store.put(f"{call_id}/closed", True, skip_if_exists=True)
        return await self.cancelled(call_id, count)

    async def crashes(self, call_id: str) -> Counter[int]:
        """How often a run of the call ended early while a job was running, by the jobs' indexes; none is 0."""
        run: dict[str, Any] = await self._store.get(f"{call_id}/run") or {"running": (), "crashes": ()}
        crashes: Counter[int] = Counter(dict(run["crashes"]))
        crashes.update(run["running"])
        return crashes

    async def start_run(self, call_id: str, running: Sequence[int], crashes: Mapping[int, int]) -> None:
        """Keep which jobs of a call run from now on, and what `crashes` returned."""
        pairs = [[index, count] for index, count in crashes.items()]
        await self._store.put(f"{call_id}/run", {"running": list(running), "crashes": pairs})

    async def count_fault(self, call_id: str) -> int:
        """Count a device that broke, or a worker that ended, under a call; returns how many there were."""
        count = 1 + (await self._store.get(f"{call_id}/faults") or 0)
        await self._store.put(f"{call_id}/faults", count)
        return count

    async def reserve(self, reservation: Reservation) -> str | None:
        """The id of the job that was made with the key; None where the caller may make it now.

        Raises `IdempotencyKeyReusedError` where another thing was asked for with the key, and `JobStoreError` while
        another request holds it.
        """
        key, name, own = reservation.key, reservation.name, self._reserved(reservation)
        if await self._store.put(name, own, skip_if_exists=True):
            return None
        known: dict[str, Any] = await self._store.get(name) or {"reserved_at": self._clock()}  # released meanwhile
        if known == own:
            return None  # the store repeats a write whose answer was lost
        if "job_id" in known:
            if known["digest"] != reservation.digest:
                raise IdempotencyKeyReusedError(key, known["job_id"])
            return str(known["job_id"])
        if self._clock() - known["reserved_at"] < RESERVATION_S:
            raise JobStoreError(f"another request with idempotency_key {key!r} is under way; retry in a moment")
        await self._store.put(name, own)
        return None

    async def renew(self, reservation: Reservation) -> Never:
        """Renew a reservation again and again until cancelled, as long as no other request has taken the key over."""
        while True:
            await anyio.sleep(RENEWAL_INTERVAL_S)
            with anyio.CancelScope(shield=True):  # else a write under way might undo a later one
                try:
                    if await self._is_held(reservation):
                        await self._store.put(reservation.name, self._reserved(reservation))
                except Exception:
                    logger.exception("The reservation of an idempotency key could not be renewed")

    async def keep(self, reservation: Reservation, job_id: str) -> None:
        """Keep which job was made with a key that was reserved."""
        await self._store.put(reservation.name, {"digest": reservation.digest, "job_id": job_id})

    async def release(self, reservation: Reservation) -> None:
        """Let another request make the job of a key, unless another one has taken the key over."""
        if await self._is_held(reservation):
            await self._store.remove(reservation.name)

    async def _is_held(self, reservation: Reservation) -> bool:
        known: dict[str, Any] = await self._store.get(reservation.name) or {}
        return known.get("token") == reservation.token

    def _reserved(self, reservation: Reservation) -> dict[str, Any]:
        return {"digest": reservation.digest, "reserved_at": self._clock(), "token": reservation.token}
