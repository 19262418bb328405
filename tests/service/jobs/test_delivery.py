"""Results reach the queues that jobs named, or are kept as undelivered; nothing waits for them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from threading import Event
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskStatus

from modalkit.service.backoff import MAX_RETRY_S, backoff_with_jitter
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    Job,
    JobCounts,
    JobEnd,
    JobStatus,
    JobStoreError,
    MemoryJobStore,
)
from modalkit.service.jobs.delivery import Deliverer
from modalkit.service.queue_backends import (
    InMemoryBackend,
    QueueMessage,
    RoutingBackend,
    UndeliverableError,
    WebhookBackend,
)
from tests.support.panic import Panic
from tests.support.webhook_receiver import WebhookReceiver

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store() -> AsyncIterator[MemoryJobStore]:
    async with MemoryJobStore() as opened:
        yield opened


async def finish_jobs(store: MemoryJobStore, *job_ids: str, queue: str = "ok") -> None:
    fields: dict[str, Any] = {"model_name": "m", "message_json": "{}", "success_queue": queue, "created_at": 1.0}
    await store.add([Job(job_id=job_id, meta_json='{"n":1}', **fields) for job_id in job_ids])
    await store.claim("m", len(job_ids), 2.0)
    done: dict[str, Any] = {"status": JobStatus.SUCCEEDED, "result_json": '{"length":1}', "finished_at": 3.0}
    await store.finish([JobEnd(job_id=job_id, **done) for job_id in job_ids])


async def delivery_of(store: MemoryJobStore, job_id: str = "job") -> tuple[DeliveryStatus, int, str | None]:
    job = await store.get(job_id)
    assert job is not None
    return job.delivery, job.delivery_attempts, job.delivery_error


async def until_delivered_or_not(store: MemoryJobStore) -> None:
    while (await store.counts()).deliveries[DeliveryStatus.PENDING]:
        await anyio.lowlevel.checkpoint()


class Single:
    """Passes messages on one by one, after it has failed so many times: by raising and by declining in turn."""

    def __init__(self, inner: InMemoryBackend, failures: int = 0) -> None:
        self.failures = failures
        self.inner = inner

    async def send_message(self, queue_name: str, message: str) -> bool:
        if self.failures > 0:
            self.failures -= 1
            if self.failures % 2:
                raise ConnectionError("the broker is down")
            return False
        return await self.inner.send_message(queue_name, message)


async def test_a_result_is_sent_with_its_job_id_and_noted_as_delivered(store: MemoryJobStore) -> None:
    queue = InMemoryBackend()
    await finish_jobs(store, "job")
    async with Deliverer(queue, store, clock=lambda: 1705314600.25):
        message = json.loads(await queue.receive("ok"))
    assert message == {
        "version": 1,
        "job_id": "job",
        "status": "success",
        "result": {"length": 1},
        "meta": {"n": 1, "timestamp": "2024-01-15T10:30:00.250000Z"},
    }
    assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 1, None)


async def test_a_failed_delivery_is_repeated_until_it_works(store: MemoryJobStore) -> None:
    queue = InMemoryBackend()
    waits: list[int] = []

    def backoff_s(attempt: int) -> float:
        waits.append(attempt)
        return 0.0

    await finish_jobs(store, "job")
    async with Deliverer(Single(queue, 3), store, backoff_s=backoff_s):
        await queue.receive("ok")
    assert waits == [1, 2, 3]
    assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 4, None)


async def test_a_delivery_is_given_up_after_so_many_attempts_and_can_be_replayed(
    store: MemoryJobStore, caplog: pytest.LogCaptureFixture
) -> None:
    queue = InMemoryBackend()
    await finish_jobs(store, "job")
    async with Deliverer(Single(queue, 3), store, max_attempts=3, backoff_s=lambda _: 0.0) as deliverer:
        await until_delivered_or_not(store)
        status, attempts, error = await delivery_of(store)
        assert (status, attempts) == (DeliveryStatus.UNDELIVERED, 3)
        assert error == "the backend did not take the message"
        assert "1 result for 'ok' is undelivered; the last one, of job job, after attempt 3" in caplog.text
        await store.replay(["job"], 4.0)
        deliverer.wake()
        await queue.receive("ok")
    assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 1, None)


async def test_a_message_that_can_never_be_sent_is_undelivered_at_once(store: MemoryJobStore) -> None:
    class Small(InMemoryBackend):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Any]:
            return [UndeliverableError("too large") if message.job_id == "b" else None for message in messages]

    await finish_jobs(store, "a", "b", "c")
    async with Deliverer(Small(), store):
        await until_delivered_or_not(store)
    assert await delivery_of(store, "b") == (DeliveryStatus.UNDELIVERED, 1, "too large")
    assert {(await delivery_of(store, job_id))[0] for job_id in "ac"} == {DeliveryStatus.DELIVERED}


async def test_a_result_for_a_queue_that_no_route_matches_any_more_is_undelivered_and_stops_no_other(
    store: MemoryJobStore,
) -> None:
    queue = InMemoryBackend()
    await finish_jobs(store, "old", queue="reports")
    async with Deliverer(RoutingBackend({"ml_*": queue}), store):
        await until_delivered_or_not(store)
        await finish_jobs(store, "new", queue="ml_results")
        await queue.receive("ml_results")
    status, attempts, error = await delivery_of(store, "old")
    assert (status, attempts) == (DeliveryStatus.UNDELIVERED, 1)
    assert "queue 'reports': matches no route" in str(error)


@pytest.mark.parametrize("error", [KeyError("ok"), Panic()])
async def test_a_backend_that_cannot_say_whether_it_keeps_messages_in_the_process_delivers(
    store: MemoryJobStore, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsure(InMemoryBackend):
        def keeps_in_process(self, queue_name: str) -> bool:
            raise error

    await finish_jobs(store, "job")
    async with Deliverer(Unsure(), store):
        await until_delivered_or_not(store)
    assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 1, None)
    assert "Unsure.keeps_in_process failed" in caplog.text


async def test_a_message_that_got_no_turn_at_a_busy_receiver_was_not_sent_and_keeps_its_attempts(
    store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalkit.service.queue_backends.webhook.MAX_REQUESTS_PER_HOST", 1)
    monkeypatch.setattr("modalkit.service.jobs.life.NOT_SENT_PAUSE_S", 0.0)
    receiver = WebhookReceiver()
    receiver.silent = Event()
    receiver.start()
    host = f"127.0.0.1:{receiver.port}"
    backend = WebhookBackend(allowed_hosts=[host], allow_private_addresses=True, timeout_s=24.99)
    try:
        for job_id in "ab":
            await finish_jobs(store, job_id, queue=f"http://{host}/{job_id}")  # a call for each
        async with Deliverer(backend, store, max_attempts=1, backoff_s=lambda _: 0.0):
            while not any(errors := [(await delivery_of(store, job_id))[2] for job_id in "ab"]):
                await anyio.lowlevel.checkpoint()
            receiver.silent.set()
            await until_delivered_or_not(store)
        assert f"http://{host}: too many messages wait for this host" in str(errors)
        assert [await delivery_of(store, job_id) for job_id in "ab"] == [(DeliveryStatus.DELIVERED, 1, None)] * 2
        assert len(receiver.received) == 2
    finally:
        receiver.silent.set()
        await backend.aclose()
        receiver.stop()


async def running_job(store: MemoryJobStore, job_id: str = "job", queue: str = "ok") -> JobEnd:
    """The end of a job that runs."""
    fields: dict[str, Any] = {"job_id": job_id, "model_name": "m", "message_json": "{}", "success_queue": queue}
    await store.add([Job(created_at=1.0, started_at=1.0, status=JobStatus.RUNNING, **fields)])
    done: dict[str, Any] = {"status": JobStatus.SUCCEEDED, "result_json": "{}", "finished_at": 3.0}
    return JobEnd(job_id=job_id, job=Job(created_at=1.0, **fields, **done), **done)


class NeverClaimed(MemoryJobStore):
    """Finds nothing that is due."""

    finish_fails = False

    async def claim_deliveries(self, *_: Any, **__: Any) -> list[Job]:
        return []

    async def finish(self, *args: Any) -> list[str]:
        if self.finish_fails:
            self.finish_fails = False
            raise JobStoreError("the disk is full")
        return await super().finish(*args)


async def test_the_result_of_a_job_that_ends_is_sent_without_being_read_from_the_store() -> None:
    queue = InMemoryBackend()
    async with NeverClaimed() as store:
        end = await running_job(store)
        async with Deliverer(queue, store) as deliverer:
            await anyio.wait_all_tasks_blocked()
            assert await deliverer.finish([end]) == ["job"]
            await until_delivered_or_not(store)
        assert json.loads(queue.receive_nowait("ok"))["job_id"] == "job"
        assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 1, None)


async def test_a_result_that_is_sent_at_once_and_not_recorded_is_due_after_a_crash(store: MemoryJobStore) -> None:
    end = await running_job(store)

    class Hangs(InMemoryBackend):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            assert await store.claim_deliveries(1, 9.0, queue_limits={}, queue_limit=1) == []
            await anyio.sleep_forever()
            return []

    async with anyio.create_task_group() as process:
        deliverer = await process.start(_open_deliverer, Deliverer(Hangs(), store))
        await anyio.wait_all_tasks_blocked()
        await deliverer.finish([end])
        await anyio.wait_all_tasks_blocked()
        process.cancel_scope.cancel()
    await store.recover(9.0)
    assert [job.job_id for job in await store.claim_quarantined_deliveries(1)] == ["job"]


async def _open_deliverer(deliverer: Deliverer, *, task_status: TaskStatus[Deliverer]) -> None:
    async with deliverer:
        task_status.started(deliverer)
        await anyio.sleep_forever()


async def test_the_result_of_a_job_that_was_cancelled_meanwhile_is_not_sent() -> None:
    queue = InMemoryBackend()
    async with NeverClaimed() as store:
        end = await running_job(store)
        await store.cancel("job", 2.0)
        async with Deliverer(queue, store) as deliverer:
            await anyio.wait_all_tasks_blocked()
            assert await deliverer.finish([end]) == []
            assert deliverer.under_way == 0
        assert queue.depth("ok") == 0


async def test_an_end_that_could_not_be_stored_is_sent_once_it_is() -> None:
    queue = InMemoryBackend()
    async with NeverClaimed() as store:
        end = await running_job(store)
        store.finish_fails = True
        async with Deliverer(queue, store) as deliverer:
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(JobStoreError, match="full"):
                await deliverer.finish([end])
            assert deliverer.under_way == queue.depth("ok") == 0
            await deliverer.finish([end])
            await until_delivered_or_not(store)
        assert queue.depth("ok") == 1


async def test_many_messages_are_sent_in_few_calls_and_memory_holds_a_bounded_number(store: MemoryJobStore) -> None:
    sizes: list[int] = []
    most = 0

    class Counting(InMemoryBackend):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            nonlocal most
            most = max(most, deliverer.under_way)
            sizes.append(len(messages))
            return await super().send_messages(messages)

    queue = Counting()
    await finish_jobs(store, *(f"{n}" for n in range(2500)))
    async with Deliverer(queue, store) as deliverer:
        await until_delivered_or_not(store)
    assert sorted(json.loads(message)["job_id"] for message in queue.messages("ok")) == sorted(map(str, range(2500)))
    assert max(sizes) == 100
    assert len(sizes) < 100
    assert most <= 1600  # half of the limit, because there is only one queue


async def test_a_queue_that_hangs_holds_up_no_other(store: MemoryJobStore) -> None:
    queue = InMemoryBackend()
    released = anyio.Event()

    class HangsForOne:
        async def send_message(self, queue_name: str, message: str) -> bool:
            if queue_name == "slow":
                await released.wait()
            return await queue.send_message(queue_name, message)

    await finish_jobs(store, *(f"slow-{n}" for n in range(1000)), queue="slow")
    await finish_jobs(store, "b")
    async with Deliverer(HangsForOne(), store):
        assert json.loads(await queue.receive("ok"))["job_id"] == "b"
        await finish_jobs(store, *(f"ok-{n}" for n in range(100)))
        for _ in range(100):
            await queue.receive("ok")
        released.set()
    assert queue.depth("slow") == 1000


async def test_a_poll_for_a_full_queue_puts_off_no_retry(
    store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalkit.service.jobs.delivery.POLL_INTERVAL_S", 1e6)
    monkeypatch.setattr("modalkit.service.jobs.delivery.MAX_SINGLE_CALLS", 2)
    tried = list[str]()
    again, released = anyio.Event(), anyio.Event()

    class FailsOnce:
        async def send_message(self, queue_name: str, message: str) -> bool:
            tried.append(queue_name)
            if queue_name == "slow":
                await released.wait()
            elif len(tried) > 2:
                again.set()
            return queue_name == "slow" or again.is_set()

    async with Deliverer(FailsOnce(), store, backoff_s=lambda _: 0.1) as deliverer:
        await anyio.wait_all_tasks_blocked()
        for job_id, queue in (("a", "slow"), ("b", "fails"), ("c", "slow")):
            await deliverer.finish([await running_job(store, job_id, queue)])
            await anyio.wait_all_tasks_blocked()
        await again.wait()
        released.set()


async def test_a_backend_that_hangs_behind_a_route_takes_no_message_of_another_along(store: MemoryJobStore) -> None:
    class Hangs:
        async def send_message(self, queue_name: str, message: str) -> bool:
            await anyio.sleep_forever()
            return True

    queue = InMemoryBackend()
    await finish_jobs(store, *(f"{n}" for n in range(5)))
    await finish_jobs(store, "hung", queue="hang")
    routing = RoutingBackend({"hang": Hangs(), "*": queue})
    async with Deliverer(routing, store, send_timeout_s=0.05, max_attempts=1):
        await until_delivered_or_not(store)
    assert queue.depth("ok") == 5
    assert {(await delivery_of(store, f"{n}"))[0] for n in range(5)} == {DeliveryStatus.DELIVERED}
    assert (await delivery_of(store, "hung"))[0] is DeliveryStatus.UNDELIVERED


@pytest.mark.parametrize("many", [True, False])
def test_a_backend_that_is_cancelled_from_inside_has_failed_and_stops_nothing(many: bool) -> None:
    """As when a library cancels what the backend awaits: asyncio raises what would end a task of ours in silence."""

    class Single:
        async def send_message(self, queue_name: str, message: str) -> bool:
            raise asyncio.CancelledError

    class Many(Single):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            raise asyncio.CancelledError

    async def deliver() -> None:
        async with MemoryJobStore() as store:
            await finish_jobs(store, "job")
            async with Deliverer(Many() if many else Single(), store, max_attempts=2, backoff_s=lambda _: 0.0):
                await until_delivered_or_not(store)
            assert (await delivery_of(store))[:2] == (DeliveryStatus.UNDELIVERED, 2)

    asyncio.run(deliver())


async def test_an_attempt_that_takes_too_long_has_failed(store: MemoryJobStore) -> None:
    class Hangs:
        async def send_message(self, queue_name: str, message: str) -> bool:
            await anyio.sleep_forever()
            return True

    await finish_jobs(store, "job")
    async with Deliverer(Hangs(), store, send_timeout_s=0.01, max_attempts=1):
        await until_delivered_or_not(store)
    assert await delivery_of(store) == (DeliveryStatus.UNDELIVERED, 1, "TimeoutError: no answer within 0.01 s")


async def test_leaving_does_not_wait_for_retries_and_says_what_is_lost(
    store: MemoryJobStore, caplog: pytest.LogCaptureFixture
) -> None:
    await finish_jobs(store, "job")
    async with Deliverer(Single(InMemoryBackend(), 10**6), store, backoff_s=lambda _: float("inf")):
        while not (await delivery_of(store))[1]:
            await anyio.lowlevel.checkpoint()
    assert (await delivery_of(store))[:2] == (DeliveryStatus.PENDING, 1)
    assert "1 results are lost: their deliveries failed, and the store is not durable" in caplog.text


async def test_leaving_sends_what_is_due_where_it_would_be_lost_and_leaves_the_rest_to_the_next_start() -> None:
    for durable in (False, True):
        queue = InMemoryBackend()
        async with MemoryJobStore() as store:
            store.durable = durable
            async with Deliverer(queue, store):
                await finish_jobs(store, *(f"{n}" for n in range(2000)))
            assert (queue.depth("ok") == 2000) is (not durable)
            pending = (await store.counts()).deliveries[DeliveryStatus.PENDING]
            assert queue.depth("ok") + pending == 2000


async def test_what_cannot_be_noted_is_noted_later(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryJobStore):
        failures = 1

        async def record_deliveries(self, records: Sequence[DeliveryRecord]) -> None:
            if self.failures:
                self.failures -= 1
                raise JobStoreError("the disk is full")
            await super().record_deliveries(records)

    queue = InMemoryBackend()
    async with Full() as store:
        await finish_jobs(store, "job")
        async with Deliverer(queue, store):
            await until_delivered_or_not(store)
    assert queue.depth("ok") == 1
    assert "The results of 1 deliveries could not be stored" in caplog.text


async def test_quarantined_deliveries_are_sent_in_groups_with_others_between_them(store: MemoryJobStore) -> None:
    """Of 40 that were claimed when the process died, 32 go first, then 8; another one goes between the groups."""
    together: list[set[str]] = []
    under_way: set[str] = set()

    class Watched:
        async def send_message(self, queue_name: str, message: str) -> bool:
            job_id = json.loads(message)["job_id"]
            under_way.add(job_id)
            together.append(set(under_way))
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            under_way.remove(job_id)
            return True

    quarantined = [f"quarantined-{n:02}" for n in range(40)]
    await finish_jobs(store, *quarantined)
    await store.claim_deliveries(99, 9.0, queue_limits={}, queue_limit=99)
    await store.recover(9.0)
    await finish_jobs(store, "other")
    async with Deliverer(Watched(), store):
        await until_delivered_or_not(store)
    assert all(group == {"other"} or "other" not in group for group in together)
    assert max(map(len, together)) == 32
    seen: list[str] = []
    for group in together:
        seen += sorted(group - set(seen))
    assert seen.index("other") == 32


async def test_quarantined_messages_to_a_queue_that_hangs_hold_up_no_other_queue(
    store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do ordinary ones to it, which are under way when the next group begins."""
    monkeypatch.setattr("modalkit.service.jobs.delivery.APART_S", 0.01)
    queue, hanging, first_group_ends = InMemoryBackend(), set[str](), anyio.Event()

    class Hangs:
        async def send_message(self, queue_name: str, message: str) -> bool:
            job_id: str = json.loads(message)["job_id"]
            if queue_name != "hangs":
                return await queue.send_message(queue_name, message)
            hanging.add(job_id)
            await (first_group_ends.wait() if job_id < "quarantined-32" else anyio.sleep_forever())
            return True

    await finish_jobs(store, *(f"quarantined-{n:02}" for n in range(40)), queue="hangs")
    await store.claim_deliveries(99, 9.0, queue_limits={}, queue_limit=99)
    await store.recover(9.0)
    await finish_jobs(store, *(f"usual-{n}" for n in range(40)), queue="hangs")
    async with anyio.create_task_group() as task_group:
        with anyio.fail_after(10):
            deliverer = Deliverer(Hangs(), store, send_timeout_s=3600)
            await task_group.start(_deliver_until_cancelled, deliverer)
            await finish_jobs(store, "other")
            await queue.receive("ok")
            assert len(hanging) == 32
            first_group_ends.set()
            while len([job_id for job_id in hanging if job_id.startswith("quarantined")]) < 40:
                await anyio.sleep(0.01)
            await finish_jobs(store, "late")
            deliverer.wake()
            await queue.receive("ok")
        task_group.cancel_scope.cancel()


async def _deliver_until_cancelled(deliverer: Deliverer, *, task_status: TaskStatus[None]) -> None:
    async with deliverer:
        task_status.started()
        await anyio.sleep_forever()


async def test_a_backend_that_ends_the_process_in_one_message_delivers_the_others(store: MemoryJobStore) -> None:
    queue = InMemoryBackend()

    class Exits:
        async def send_message(self, queue_name: str, message: str) -> bool:
            if '"b"' in message:
                raise SystemExit(1)
            return await queue.send_message(queue_name, message)

    await finish_jobs(store, "a", "b", "c")
    async with Deliverer(Exits(), store, max_attempts=2, backoff_s=lambda _: 0.0):
        await until_delivered_or_not(store)
    assert queue.depth("ok") == 2
    status, attempts, error = await delivery_of(store, "b")
    assert (status, attempts) == (DeliveryStatus.UNDELIVERED, 2)
    assert "raised SystemExit: 1" in str(error)


async def test_a_store_that_fails_and_is_not_durable_does_not_hold_up_the_exit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(MemoryJobStore):
        async def claim_quarantined_deliveries(self, limit: int) -> list[Job]:
            await anyio.lowlevel.checkpoint()
            raise JobStoreError("the server is gone")

        async def claim_deliveries(self, limit: int, now: float, **limits: Any) -> Sequence[Job]:
            raise JobStoreError("the server is gone")

        async def counts(self) -> JobCounts:
            raise JobStoreError("the server is gone")

    with anyio.fail_after(10):
        async with Failing() as store, Deliverer(InMemoryBackend(), store):
            pass
    assert "Results may be lost" in caplog.text


async def test_large_messages_are_sent_a_few_at_a_time(store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalkit.service.jobs.delivery.MAX_BYTES_UNDER_WAY", 100)
    queue = InMemoryBackend()
    await finish_jobs(store, *(f"{n}" for n in range(200)))
    async with Deliverer(Single(queue), store):
        await until_delivered_or_not(store)
    assert queue.depth("ok") == 200


def test_waits_grow_up_to_a_limit_and_keep_at_least_half() -> None:
    for attempt, longest_s in [(1, 0.5), (2, 2.0), (5, 128.0), (30, MAX_RETRY_S), (5000, MAX_RETRY_S)]:
        waits = [backoff_with_jitter(attempt) for _ in range(200)]
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s


@pytest.fixture(autouse=True)
def _log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
