"""Results of a call's jobs on their way to queues that are not always there."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import pytest

from modalkit.batching import Priority
from modalkit.service.calls import delivery
from modalkit.service.calls.delivery import send_results
from modalkit.service.jobs.life import after_delivery_attempt, end_job, start_job
from modalkit.service.jobs.model import DeliveryStatus, Job, JobEnd, JobStatus
from modalkit.service.metrics import REGISTRY
from modalkit.service.queue_backends import (
    InMemoryBackend,
    NotSentError,
    QueueBackend,
    QueueMessage,
    UndeliverableError,
)

pytestmark = pytest.mark.anyio

Refusal = bool | Exception | None


@dataclass
class Unsteady:
    """Refuses, for each queue, as often and as it is told, and takes messages afterwards."""

    refusals: dict[str, list[Refusal]] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)
    taken: dict[str, list[str]] = field(default_factory=dict)

    async def send_message(self, queue_name: str, message: str) -> bool:
        self.attempts.append(queue_name)
        if self.refusals.get(queue_name):
            refusal = self.refusals[queue_name].pop(0)
            if isinstance(refusal, Exception):
                raise refusal
            return bool(refusal)
        self.taken.setdefault(queue_name, []).append(message)
        return True


def ended(queue: str | None, name: str = "job", status: JobStatus = JobStatus.SUCCEEDED) -> Job:
    job = Job(
        job_id=name,
        model_name="lengths",
        message_json="{}",
        success_queue=queue,
        failure_queue=queue,
        meta_json="{}",
        priority=Priority.BULK,
        created_at=0.0,
    )
    result = "{}" if status is JobStatus.SUCCEEDED else None
    end = JobEnd(job_id=name, status=status, result_json=result, error="e", finished_at=1.0)
    finished = end_job(start_job(job, 0.0), end)
    assert finished is not None
    return finished


def at_once(attempt: int) -> float:
    return 0.0


async def send(
    backend: QueueBackend,
    jobs: Sequence[Job],
    until_s: float,
    max_attempts: int = 5,
    backoff_s: Callable[[int], float] = at_once,
) -> list[Job]:
    return await send_results(backend, jobs, until_s, max_attempts=max_attempts, backoff_s=backoff_s, clock=lambda: 0.0)


def later() -> float:
    return anyio.current_time() + 60


async def test_results_that_are_not_taken_are_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    backend = Unsteady({"q": [False, ConnectionError("down"), None]})
    (job,) = await send(backend, [ended("q")], later())
    assert (job.delivery, job.delivery_attempts, job.delivery_error) == (DeliveryStatus.DELIVERED, 4, None)
    assert backend.attempts == ["q"] * 4
    (message,) = backend.taken["q"]
    assert json.loads(message)["job_id"] == "job"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "1 result for 'q' was not taken and is sent again" in caplog.text
    assert "attempt 2: ConnectionError: down" in caplog.text


async def test_a_result_is_given_up_after_so_many_attempts(caplog: pytest.LogCaptureFixture) -> None:
    backend = Unsteady({"q": [ConnectionError("down")] * 9})
    (job,) = await send(backend, [ended("q")], later(), max_attempts=3)
    assert (job.delivery, job.delivery_attempts) == (DeliveryStatus.UNDELIVERED, 3)
    assert job.delivery_error == "ConnectionError: down"
    assert backend.attempts == ["q"] * 3
    assert caplog.records[-1].levelno == logging.ERROR
    assert "1 result for 'q' is undelivered; the last one, of job job, after attempt 3" in caplog.text


async def test_a_result_is_given_up_when_the_next_attempt_would_come_too_late() -> None:
    backend = Unsteady({"q": [False] * 9})
    (job,) = await send(backend, [ended("q")], later(), backoff_s=lambda attempt: 0.0 if attempt < 2 else 3600.0)
    assert (job.delivery, job.delivery_attempts) == (DeliveryStatus.UNDELIVERED, 2)


async def test_what_can_never_be_sent_is_tried_once() -> None:
    backend = Unsteady({"q": [UndeliverableError("too large")]})
    (job,) = await send(backend, [ended("q")], later())
    assert (job.delivery, job.delivery_attempts) == (DeliveryStatus.UNDELIVERED, 1)
    assert job.delivery_error == "too large"
    assert backend.attempts == ["q"]


async def test_what_was_not_sent_counts_as_no_attempt() -> None:
    def failed() -> float:
        return REGISTRY.get_sample_value("modalkit_delivery_attempts_total", {"outcome": "pending"}) or 0.0

    before = failed()
    (job,) = await send(Unsteady({"q": [NotSentError("busy"), ConnectionError("down")]}), [ended("q")], later())
    assert (job.delivery, job.delivery_attempts) == (DeliveryStatus.DELIVERED, 2)
    assert failed() - before == 1


def test_what_was_not_sent_is_due_again_some_seconds_later() -> None:
    record = after_delivery_attempt(ended("q"), NotSentError("busy"), max_attempts=1, now=10.0)
    assert (record.status, record.attempts, record.due_at) == (DeliveryStatus.PENDING, 0, 15.0)


async def test_a_backend_that_hangs_has_until_the_call_ends() -> None:
    class Hanging:
        async def send_message(self, queue_name: str, message: str) -> bool:
            await anyio.sleep_forever()
            return True

    (job,) = await send(Hanging(), [ended("q")], anyio.current_time() + 0.01)
    assert (job.delivery, job.delivery_attempts) == (DeliveryStatus.UNDELIVERED, 1)
    assert (job.delivery_error or "").startswith("TimeoutError: no answer within")


async def test_a_backend_that_hangs_once_at_one_queue_delivers_all_results(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    class HangsOnce:
        has_hung = False

        async def send_message(self, queue_name: str, message: str) -> bool:
            raise NotImplementedError

        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            for message in messages:
                if message.queue_name == "hangs" and not self.has_hung:
                    self.has_hung = True
                    await anyio.sleep_forever()
                taken.append(message.job_id)
            return [None] * len(messages)

    monkeypatch.setattr(delivery, "SEND_TIMEOUT_S", 1.0)
    jobs = [ended("fine", "0"), ended("hangs", "1"), ended("fine too", "2")]
    sent = await send(HangsOnce(), jobs, later())
    assert [(str(job.delivery), job.delivery_attempts) for job in sent] == [
        *(("delivered", 1), ("delivered", 2), ("delivered", 1))
    ]
    assert sorted(taken) == ["0", "1", "2"]


@pytest.mark.parametrize("queues", [3, 1000])
async def test_calls_to_any_number_of_queues_are_limited_together(queues: int) -> None:
    class Counting:
        under_way = most = 0

        async def send_message(self, queue_name: str, message: str) -> bool:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            self.under_way -= 1
            return True

    backend = Counting()
    sent = await send(backend, [ended(f"q{n % queues}", str(n)) for n in range(1000)], later())
    assert {str(job.delivery) for job in sent} == {"delivered"}
    assert 90 <= backend.most <= 100


async def test_what_stays_in_the_memory_of_the_container_does_not_count_as_delivered() -> None:
    (job,) = await send(InMemoryBackend(is_read=False), [ended("q")], later())
    assert job.delivery is DeliveryStatus.MEMORY


async def test_a_queue_that_fails_leaves_the_others_results_delivered(caplog: pytest.LogCaptureFixture) -> None:
    backend = Unsteady({"down": [ConnectionError("down")] * 99})
    jobs = [ended("up", "0"), ended("down", "1"), ended("up", "2"), ended("down", "3", JobStatus.FAILED)]
    sent = await send(backend, jobs, later(), max_attempts=2)
    assert [job.job_id for job in sent] == ["0", "1", "2", "3"]
    assert [str(job.delivery) for job in sent] == ["delivered", "undelivered", "delivered", "undelivered"]
    assert {json.loads(message)["job_id"] for message in backend.taken["up"]} == {"0", "2"}
    assert backend.attempts.count("up") == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]
    assert "2 results for 'down' are undelivered; the last one, of job 3" in caplog.text


async def test_only_what_is_due_is_sent() -> None:
    backend = InMemoryBackend()
    jobs = [ended(None, "names no queue"), ended("q", "0")]
    sent = await send(backend, jobs, later())
    assert [str(job.delivery) for job in sent] == ["none", "delivered"]
    assert await send(backend, sent, later()) == sent
    assert backend.depth("q") == 1
    assert await send(backend, [], later()) == []


async def test_a_backend_that_takes_many_gets_those_of_a_queue_together_and_again_only_what_failed() -> None:
    batches: list[list[str]] = []

    class Batches(InMemoryBackend):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            batches.append([message.job_id for message in messages])
            failed = None if ["1"] in batches else ConnectionError("this one")
            return [failed if message.job_id == "1" else None for message in messages]  # type: ignore[misc]  # wider

    sent = await send(Batches(), [ended("q", "0"), ended("q", "1"), ended("p", "2")], later())
    assert sorted(batches) == [["0", "1"], ["1"], ["2"]]
    assert [(str(job.delivery), job.delivery_attempts) for job in sent] == [
        *(("delivered", 1), ("delivered", 2), ("delivered", 1))
    ]


async def test_a_backend_that_takes_many_gets_up_to_a_hundred_in_a_call() -> None:
    """A call carries as many jobs as its caller likes."""
    sizes: list[int] = []

    class Batches(InMemoryBackend):
        async def send_messages(self, messages: Sequence[QueueMessage]) -> list[None]:
            sizes.append(len(messages))
            if messages[0].job_id == "100":
                raise ConnectionError("this hundred")
            return await super().send_messages(messages)

    sent = await send(Batches(), [ended("q", str(n)) for n in range(250)], later(), max_attempts=1)
    assert sorted(sizes) == [50, 100, 100]
    assert [job.delivery is DeliveryStatus.DELIVERED for job in sent] == [not 100 <= n < 200 for n in range(250)]


async def test_secrets_of_a_webhooks_address_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    queue = "https://user:password@example.com/hook?token=secret"
    await send(Unsteady({queue: [False]}), [ended(queue)], later())
    assert "example.com" in caplog.text
    assert "password" not in caplog.text
    assert "secret" not in caplog.text
