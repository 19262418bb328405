"""What doors and containers agree on, in a dictionary: one that is in memory, and Modal's."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from grpclib import Status
from modalkit.service.on_modal.ledger import RESERVATION_S, CallLedger, MemoryTable, Reservation, Table
from modalkit.service.on_modal.tables import ModalTable, open_ledger

from modalkit.batching import Priority
from modalkit.service.jobs import IdempotencyKeyReusedError, Job, JobStatus, JobStoreError
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.settings import Settings
from tests.support.modal_server import ModalServer

pytestmark = pytest.mark.anyio

CALL = "fc-01J"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Modal's client runs on asyncio alone


@pytest.fixture(params=["memory", "modal"])
def open_table(request: pytest.FixtureRequest) -> Callable[[], Table]:
    """Opens the same table again and again, as one process after the other does."""
    if request.param == "memory":
        table = MemoryTable()
        return lambda: table
    request.getfixturevalue("modal_server")
    return lambda: ModalTable("jobs")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(open_table: Callable[[], Table], clock: Clock) -> CallLedger:
    return CallLedger(open_table(), clock=clock)


@pytest.fixture
def other(open_table: Callable[[], Table], clock: Clock) -> CallLedger:
    """The ledger as another process sees it."""
    return CallLedger(open_table(), clock=clock)


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


async def test_a_table_keeps_what_is_put_and_forgets_what_is_removed(open_table: Callable[[], Table]) -> None:
    table, again = open_table(), open_table()
    assert await table.get("a") is None
    assert await table.put("a", {"n": [1, 2.5, None]})
    assert await again.get("a") == {"n": [1, 2.5, None]}
    assert not await again.put("a", 2, skip_if_exists=True)
    assert await table.put("a", 3)
    assert await again.get("a") == 3
    await again.remove("a")
    await again.remove("a")
    assert await table.get("a") is None
    assert await table.put("a", 4, skip_if_exists=True)


async def test_what_jobs_ask_for_is_known_to_all(ledger: CallLedger, other: CallLedger) -> None:
    assert await other.jobs(CALL) is None
    await ledger.record(CALL, [job(0), job(1)])
    assert await other.jobs(CALL) == [job(0), job(1)]


async def test_a_job_that_is_cancelled_before_its_call_closes_is_found_by_it(
    ledger: CallLedger, other: CallLedger
) -> None:
    assert await other.cancelled(CALL, 3) == frozenset()
    assert await ledger.cancel(CALL, 1)
    assert await other.cancelled(CALL, 3) == await other.close(CALL, 3) == {1}
    assert await ledger.is_cancelled(CALL, 1)
    assert not await ledger.is_cancelled(CALL, 0)


async def test_a_job_is_not_cancelled_after_its_call_closed(ledger: CallLedger, other: CallLedger) -> None:
    assert await other.close(CALL, 3) == frozenset()
    assert not await ledger.cancel(CALL, 1)
    assert not await ledger.is_cancelled(CALL, 1)
    assert await other.close(CALL, 3) == frozenset()  # as a call does that runs again


async def test_jobs_of_a_call_are_cancelled_one_by_one_and_other_calls_know_nothing_of_it(ledger: CallLedger) -> None:
    for index in (0, 2):
        assert await ledger.cancel(CALL, index)
    assert await ledger.cancelled(CALL, 4) == {0, 2}
    assert await ledger.cancelled("fc-01K", 4) == frozenset()
    assert await ledger.close(CALL, 4) == {0, 2}
    assert not await ledger.cancel(CALL, 3)
    assert await ledger.cancelled(CALL, 4) == {0, 2}


async def test_a_cancellation_that_meets_the_close_is_either_found_or_refused(
    ledger: CallLedger, other: CallLedger
) -> None:
    """Never told to be in time and yet missed by the container."""
    for number in range(20):
        call_id, found, told = f"{CALL}{number}", set[int](), set[int]()

        async def cancel(index: int, call_id: str = call_id, told: set[int] = told) -> None:
            if await ledger.cancel(call_id, index):
                told.add(index)

        async with anyio.create_task_group() as task_group:
            for index in range(4):
                task_group.start_soon(cancel, index)
                if index == number % 4:
                    found |= await other.close(call_id, 4)
        assert told <= found


async def test_a_job_is_known_to_have_run_alone_when_its_call_was_cut_short(
    ledger: CallLedger, other: CallLedger
) -> None:
    assert [await ledger.begin(CALL), await other.begin(CALL), await other.begin("fc-01K")] == [1, 2, 1]
    assert await ledger.crashes(CALL) == {}
    await ledger.run_alone(CALL, 1, {})
    assert await other.crashes(CALL) == {1: 1}
    await other.run_alone(CALL, 1, {1: 1})
    assert await ledger.crashes(CALL) == {1: 2}
    await ledger.run_alone(CALL, None, {1: 2})
    assert await other.crashes(CALL) == {1: 2}


async def test_broken_devices_are_counted_for_each_call(ledger: CallLedger, other: CallLedger) -> None:
    assert [await ledger.faults(CALL), await other.faults(CALL), await other.faults("fc-01K")] == [1, 2, 1]


async def test_the_same_request_gets_the_same_job_and_another_is_refused(ledger: CallLedger, other: CallLedger) -> None:
    reserved = await ledger.reserve("key", "one")
    assert isinstance(reserved, Reservation)
    await ledger.keep(reserved, "fc-1.0")
    assert await other.reserve("key", "one") == "fc-1.0"
    with pytest.raises(IdempotencyKeyReusedError, match=r"'key' belongs to job fc-1\.0"):
        await other.reserve("key", "two")
    assert isinstance(await other.reserve("other key", "two"), Reservation)


async def test_a_repetition_is_refused_while_the_first_request_is_under_way(
    ledger: CallLedger, other: CallLedger, clock: Clock
) -> None:
    reserved = await ledger.reserve("key", "one")
    assert isinstance(reserved, Reservation)
    clock.now += RESERVATION_S - 1
    for digest in ("one", "two"):
        with pytest.raises(JobStoreError, match="'key' is under way; retry in a moment"):
            await other.reserve("key", digest)
    await ledger.keep(reserved, "fc-1.0")
    assert await other.reserve("key", "one") == "fc-1.0"


async def test_of_many_that_reserve_at_once_one_may(ledger: CallLedger, other: CallLedger) -> None:
    reservations: list[Reservation | str] = []

    async def reserve(ledger: CallLedger) -> None:
        with suppress(JobStoreError):
            reservations.append(await ledger.reserve("key", "one"))

    async with anyio.create_task_group() as task_group:
        for of in (ledger, other) * 5:
            task_group.start_soon(reserve, of)
    assert len(reservations) == 1


async def test_what_a_dead_process_reserved_is_taken_over_after_a_minute(
    ledger: CallLedger, other: CallLedger, clock: Clock
) -> None:
    await ledger.reserve("key", "one")
    clock.now += RESERVATION_S
    taken = await other.reserve("key", "two")
    assert taken == Reservation("key", "two")
    with pytest.raises(JobStoreError, match="under way"):
        await ledger.reserve("key", "two")


async def test_what_is_given_back_can_be_reserved_at_once(ledger: CallLedger, other: CallLedger) -> None:
    reserved = await ledger.reserve("key", "one")
    assert isinstance(reserved, Reservation)
    await ledger.give_back(reserved)
    assert isinstance(await other.reserve("key", "two"), Reservation)


async def test_modals_table_says_that_it_cannot_be_reached(modal_server: ModalServer) -> None:
    table = ModalTable("jobs")
    await table.put("a", 1)
    for request in ("DictGet", "DictUpdate", "DictPop"):
        modal_server.refusals[request] = Status.RESOURCE_EXHAUSTED
    for use in (lambda: table.get("a"), lambda: table.put("a", 2), lambda: table.remove("a")):
        with pytest.raises(JobStoreError, match=r"modal.Dict of jobs could not be reached: ResourceExhaustedError"):
            await use()


async def test_modals_table_is_asked_again_while_it_is_out_of_reach(
    modal_server: ModalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the call of a container would fail for it, and with it all of its jobs."""
    monkeypatch.setattr("modalkit.service.on_modal.tables.RETRY_S", 0.0)
    table = ModalTable("jobs")
    await table.put("a", 1)
    modal_server.refusals["DictGet"] = Status.UNAVAILABLE
    found: list[int] = []

    async def get() -> None:
        found.append(await table.get("a"))

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(get)
        while not caplog.records:  # Modal's client has given up
            await anyio.sleep(0.001)
        del modal_server.refusals["DictGet"]
    assert found == [1]
    assert "could not be reached: ServiceError" in caplog.text


async def test_modals_table_is_not_asked_for_ever(modal_server: ModalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalkit.service.on_modal.tables.PATIENCE_S", 0.0)
    modal_server.refusals["DictGet"] = Status.UNAVAILABLE
    with pytest.raises(JobStoreError, match="could not be reached: ServiceError"):
        await ModalTable("jobs").get("a")


async def test_one_mark_that_cannot_be_read_is_an_error_and_no_group_of_them() -> None:
    class OutOfReach(MemoryTable):
        async def get(self, key: str) -> object:
            if key.endswith(("/0", "/1")):
                raise JobStoreError("the table is gone")
            return await super().get(key)

    ledger = CallLedger(OutOfReach())
    assert await ledger.cancel(CALL, 1)
    for ask in (ledger.cancelled, ledger.close):
        with pytest.raises(JobStoreError, match="the table is gone"):
            await ask(CALL, 3)


async def test_without_a_token_the_table_is_made_and_says_so_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    ledger = open_ledger(ModalConfig(Settings(), environ={}))
    with pytest.raises(JobStoreError, match="Token missing"):
        await ledger.jobs(CALL)


async def test_the_containers_of_an_app_share_a_ledger(modal_server: ModalServer) -> None:
    settings = Settings(app_settings={"app_prefix": "mine"})
    await open_ledger(ModalConfig(settings, environ={})).record(CALL, [job(0)])
    (found,) = await open_ledger(ModalConfig(settings, environ={})).jobs(CALL) or []
    assert found.status is JobStatus.QUEUED
    assert await open_ledger(ModalConfig(settings, environ={"MODALKIT_APP_POSTFIX": "-live"})).jobs(CALL) is None
