"""What frontends and workers agree on, in a key-value store: the one in memory, and Modal's."""

from collections.abc import Callable
from contextlib import suppress

import anyio
import pytest

from modalkit.batching import Priority
from modalkit.service.calls.engine import KeyValueStore, MemoryKeyValueStore
from modalkit.service.calls.records import RESERVATION_S, CallRecords, Reservation
from modalkit.service.jobs import IdempotencyKeyReusedError, Job, JobStoreError
from modalkit.service.on_modal.engine import ModalKeyValueStore
from modalkit.testing import FakeClock

pytestmark = pytest.mark.anyio

CALL = "fc-01J"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Modal's client runs on asyncio alone


@pytest.fixture(params=["memory", "modal"])
def open_store(request: pytest.FixtureRequest) -> Callable[[], KeyValueStore]:
    """Opens the same store again and again, as one process after the other does."""
    if request.param == "memory":
        store = MemoryKeyValueStore()
        return lambda: store
    request.getfixturevalue("modal_server")
    return lambda: ModalKeyValueStore("jobs")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def records(open_store: Callable[[], KeyValueStore], clock: FakeClock) -> CallRecords:
    return CallRecords(open_store(), clock=clock)


@pytest.fixture
def other(open_store: Callable[[], KeyValueStore], clock: FakeClock) -> CallRecords:
    """The records as another process sees it."""
    return CallRecords(open_store(), clock=clock)


def job(index: int) -> Job:
    return Job(
        job_id=f"{CALL}.{index}",
        model_name="lengths",
        message_json='{"text":"four"}',
        success_queue="ok",
        failure_queue=None,
        meta_json="{}",
        priority=Priority.BULK,
        created_at=1.5,
    )


async def test_a_store_keeps_what_is_put_and_forgets_what_is_removed(open_store: Callable[[], KeyValueStore]) -> None:
    store, again = open_store(), open_store()
    assert await store.get("a") is None
    assert await store.put("a", {"n": [1, 2.5, None]})
    assert await again.get("a") == {"n": [1, 2.5, None]}
    assert not await again.put("a", 2, skip_if_exists=True)
    assert await store.put("a", 3)
    assert await again.get("a") == 3
    assert await again.put("b", 5)
    assert await store.items() == {"a": 3, "b": 5}
    await store.remove("b")
    await again.remove("a")
    await again.remove("a")
    assert await store.get("a") is None
    assert await store.put("a", 4, skip_if_exists=True)


async def test_what_jobs_ask_for_is_known_to_all(records: CallRecords, other: CallRecords) -> None:
    assert await other.jobs(CALL) is None
    await records.record(CALL, [job(0), job(1)])
    assert await other.jobs(CALL) == [job(0), job(1)]


async def test_a_job_that_is_cancelled_before_its_call_closes_is_found_by_it(
    records: CallRecords, other: CallRecords
) -> None:
    assert await other.cancelled(CALL, 3) == frozenset()
    assert await records.cancel(CALL, 1)
    assert await other.cancelled(CALL, 3) == await other.close(CALL, 3) == {1}
    assert await records.is_cancelled(CALL, 1)
    assert not await records.is_cancelled(CALL, 0)


async def test_a_job_is_not_cancelled_after_its_call_closed(records: CallRecords, other: CallRecords) -> None:
    assert await other.close(CALL, 3) == frozenset()
    assert not await records.cancel(CALL, 1)
    assert not await records.is_cancelled(CALL, 1)
    assert await other.close(CALL, 3) == frozenset()  # as a call does that runs again


async def test_jobs_of_a_call_are_cancelled_one_by_one_and_other_calls_know_nothing_of_it(records: CallRecords) -> None:
    for index in (0, 2):
        assert await records.cancel(CALL, index)
    assert await records.cancelled(CALL, 4) == {0, 2}
    assert await records.cancelled("fc-01K", 4) == frozenset()
    assert await records.close(CALL, 4) == {0, 2}
    assert not await records.cancel(CALL, 3)
    assert await records.cancelled(CALL, 4) == {0, 2}


async def test_a_cancellation_that_meets_the_close_is_either_found_or_refused(
    records: CallRecords, other: CallRecords
) -> None:
    """Never told to be in time and yet missed by the container."""
    for number in range(20):
        call_id, found, told = f"{CALL}{number}", set[int](), set[int]()

        async def cancel(index: int, call_id: str = call_id, told: set[int] = told) -> None:
            if await records.cancel(call_id, index):
                told.add(index)

        async with anyio.create_task_group() as task_group:
            for index in range(4):
                task_group.start_soon(cancel, index)
                if index == number % 4:
                    found |= await other.close(call_id, 4)
        assert told <= found


async def test_each_job_that_was_running_when_its_call_was_cut_short_has_one_crash_more(
    records: CallRecords, other: CallRecords
) -> None:
    assert await records.crashes(CALL) == {}
    await records.start_run(CALL, [0, 1], {})
    crashes = await other.crashes(CALL)
    assert crashes == {0: 1, 1: 1}
    await other.start_run(CALL, [1], crashes)
    assert await records.crashes(CALL) == {0: 1, 1: 2}
    await records.start_run(CALL, (), {0: 1, 1: 2})
    assert await other.crashes(CALL) == {0: 1, 1: 2}
    assert await other.crashes("fc-01K") == {}


async def test_broken_devices_are_counted_for_each_call(records: CallRecords, other: CallRecords) -> None:
    counts = [await records.count_fault(CALL), await other.count_fault(CALL), await other.count_fault("fc-01K")]
    assert counts == [1, 2, 1]


async def test_the_same_request_gets_the_same_job_and_another_is_refused(
    records: CallRecords, other: CallRecords
) -> None:
    assert await records.reserve(Reservation("key", "one")) is None
    await records.keep(Reservation("key", "one"), "fc-1.0")
    assert await other.reserve(Reservation("key", "one")) == "fc-1.0"
    with pytest.raises(IdempotencyKeyReusedError, match=r"'key' belongs to job fc-1\.0"):
        await other.reserve(Reservation("key", "two"))
    assert await other.reserve(Reservation("other key", "two")) is None


async def test_a_repetition_is_refused_while_the_first_request_is_under_way(
    records: CallRecords, other: CallRecords, clock: FakeClock
) -> None:
    assert await records.reserve(Reservation("key", "one")) is None
    clock.advance(RESERVATION_S - 1)
    for digest in ("one", "two"):
        with pytest.raises(JobStoreError, match="'key' is under way; retry in a moment"):
            await other.reserve(Reservation("key", digest))
    await records.keep(Reservation("key", "one"), "fc-1.0")
    assert await other.reserve(Reservation("key", "one")) == "fc-1.0"


async def test_of_many_that_reserve_at_once_one_may(records: CallRecords, other: CallRecords) -> None:
    reservations: list[str | None] = []

    async def reserve(records: CallRecords) -> None:
        with suppress(JobStoreError):
            reservations.append(await records.reserve(Reservation("key", "one")))

    async with anyio.create_task_group() as task_group:
        for of in (records, other) * 5:
            task_group.start_soon(reserve, of)
    assert reservations == [None]


async def test_what_a_dead_process_reserved_is_taken_over_after_a_minute(
    records: CallRecords, other: CallRecords, clock: FakeClock
) -> None:
    await records.reserve(Reservation("key", "one"))
    clock.advance(RESERVATION_S)
    assert await other.reserve(Reservation("key", "two")) is None
    with pytest.raises(JobStoreError, match="under way"):
        await records.reserve(Reservation("key", "two"))


async def test_what_is_given_back_can_be_reserved_at_once(records: CallRecords, other: CallRecords) -> None:
    reservation = Reservation("key", "one")
    assert await records.reserve(reservation) is None
    await records.release(reservation)
    assert await other.reserve(Reservation("key", "two")) is None


async def test_one_mark_that_cannot_be_read_is_an_error_and_no_group_of_them() -> None:
    class OutOfReach(MemoryKeyValueStore):
        async def get(self, key: str) -> object:
            if key.endswith(("/0", "/1")):
                raise JobStoreError("the store is gone")
            return await super().get(key)

    records = CallRecords(OutOfReach())
    assert await records.cancel(CALL, 1)
    for ask in (records.cancelled, records.close):
        with pytest.raises(JobStoreError, match="the store is gone"):
            await ask(CALL, 3)
