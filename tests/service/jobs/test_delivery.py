"""Results reach the queues they named, or are set aside in sight; nothing waits for them."""

import json
import logging
from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest

from service.jobs import DeliveryStatus, FinishedJob, Job, JobStatus, MemoryJobStore, NewJob
from service.jobs.delivery import LONGEST_RETRY_S, Deliverer, backoff_with_jitter
from service.queue_backends import InMemoryBackend

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store() -> AsyncIterator[MemoryJobStore]:
    async with MemoryJobStore() as opened:
        yield opened


async def finished_job(store: MemoryJobStore, job_id: str = "job", queue: str = "ok") -> Job:
    await store.add(
        [NewJob(job_id=job_id, model_name="m", message={"text": "a"}, success_queue=queue, meta={"n": 1}, created_at=1)]
    )
    await store.take("m", 1, 2.0)
    done = FinishedJob(job_id=job_id, status=JobStatus.SUCCEEDED, result={"length": 1}, finished_at=3.0)
    (job,) = await store.finish([done])
    return job


async def delivery_of(store: MemoryJobStore, job_id: str = "job") -> tuple[DeliveryStatus, int, str | None]:
    job = await store.get(job_id)
    assert job is not None
    return job.delivery, job.delivery_attempts, job.delivery_error


class Flaky:
    """Fails so many times, by raising and by declining in turn, then passes on."""

    def __init__(self, failures: int, inner: InMemoryBackend) -> None:
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
    job = await finished_job(store)
    async with Deliverer(queue, store, clock=lambda: 1705314600.25) as deliverer:
        deliverer.enqueue(job)
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

    job = await finished_job(store)
    async with Deliverer(Flaky(3, queue), store, backoff_s=backoff_s) as deliverer:
        deliverer.enqueue(job)
        await queue.receive("ok")
    assert waits == [1, 2, 3]
    assert await delivery_of(store) == (DeliveryStatus.DELIVERED, 4, None)


async def test_a_delivery_is_set_aside_after_so_many_attempts(
    store: MemoryJobStore, caplog: pytest.LogCaptureFixture
) -> None:
    job = await finished_job(store)
    backend = Flaky(10**6, InMemoryBackend())
    async with Deliverer(backend, store, max_attempts=3, backoff_s=lambda _: 0.0) as deliverer:
        deliverer.enqueue(job)
        while (await delivery_of(store))[0] is DeliveryStatus.PENDING:
            await anyio.lowlevel.checkpoint()
    status, attempts, error = await delivery_of(store)
    assert (status, attempts) == (DeliveryStatus.UNDELIVERED, 3)
    assert error == "ConnectionError: the broker is down"
    assert "set aside as undelivered after 3 attempts" in caplog.text


async def test_a_slow_queue_holds_up_no_other(store: MemoryJobStore) -> None:
    queue = InMemoryBackend()
    released = anyio.Event()

    class SlowForOne:
        async def send_message(self, queue_name: str, message: str) -> bool:
            if queue_name == "slow":
                await released.wait()
            return await queue.send_message(queue_name, message)

    async with Deliverer(SlowForOne(), store) as deliverer:
        deliverer.enqueue(await finished_job(store, "a", "slow"))
        deliverer.enqueue(await finished_job(store, "b", "ok"))
        assert json.loads(await queue.receive("ok"))["job_id"] == "b"
        released.set()
        assert json.loads(await queue.receive("slow"))["job_id"] == "a"


async def test_leaving_does_not_wait_for_retries_and_says_what_is_lost(
    store: MemoryJobStore, caplog: pytest.LogCaptureFixture
) -> None:
    job = await finished_job(store)
    failed = anyio.Event()

    def forever(_: int) -> float:
        failed.set()
        return float("inf")

    async with Deliverer(Flaky(10**6, InMemoryBackend()), store, backoff_s=forever) as deliverer:
        deliverer.enqueue(job)
        await failed.wait()
    assert (await delivery_of(store))[:2] == (DeliveryStatus.PENDING, 1)
    assert "The result of job job is lost" in caplog.text


async def test_what_was_left_pending_is_delivered_on_recovery(store: MemoryJobStore) -> None:
    queue = InMemoryBackend(max_messages_per_queue=5000)
    for n in range(2500):
        await finished_job(store, f"job-{n}")
    async with Deliverer(queue, store) as deliverer:
        await deliverer.recover()
    assert {json.loads(message)["job_id"] for message in queue.messages("ok")} == {f"job-{n}" for n in range(2500)}
    assert await store.pending_deliveries(10) == []


def test_waits_double_up_to_a_limit_and_keep_at_least_half() -> None:
    for attempt, longest_s in [(1, 0.5), (2, 1.0), (5, 8.0), (30, LONGEST_RETRY_S), (5000, LONGEST_RETRY_S)]:
        waits = [backoff_with_jitter(attempt) for _ in range(200)]
        assert longest_s / 2 <= min(waits) < max(waits) <= longest_s


@pytest.fixture(autouse=True)
def _log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
