"""Jobs move from the store into the scheduler a window at a time, and every end of theirs is stored."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from batching import Priority, QueueFullError, SchedulerClosedError
from service.jobs import FinishedJob, Job, JobStatus, JobStoreError, MemoryJobStore
from service.jobs.manager import JobManager
from service.jobs.runner import JobRunner
from service.queue_backends import InMemoryBackend

pytestmark = pytest.mark.anyio


class Clock:
    """Wall-clock seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Flaky(MemoryJobStore):
    """Cannot store any end, or give out any job, so many times."""

    failures = 0

    def _maybe_fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise JobStoreError("the disk is full")

    async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
        self._maybe_fail()
        return await super().finish(outcomes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Flaky:
    return Flaky()


@pytest.fixture
async def manager(store: Flaky, clock: Clock) -> AsyncIterator[JobManager]:
    async with JobManager(store, clock=clock, result_ttl_s=60) as opened:
        yield opened


async def ended(manager: JobManager, job_id: str) -> Job:
    job = await manager.get(job_id, wait_s=30)
    assert job is not None
    return job


async def test_never_more_than_the_window_is_taken(manager: JobManager) -> None:
    release, most = anyio.Event(), 0

    async def run_job(job: Job, _: float) -> dict[str, Any]:
        nonlocal most
        most = max(most, runner.running)
        await release.wait()
        return job.message

    runner = JobRunner(manager, "m", run_job, window=3)
    async with runner:
        job_ids = [await manager.submit("m", {"n": n}) for n in range(20)]
        while runner.running < 3:
            await anyio.lowlevel.checkpoint()
        counts = await manager.store.counts()
        assert (counts[JobStatus.RUNNING], counts[JobStatus.QUEUED]) == (3, 17)
        release.set()
        jobs = [await ended(manager, job_id) for job_id in job_ids]
    assert [job.result for job in jobs] == [{"n": n} for n in range(20)]
    assert most == 3


async def test_a_runner_takes_only_the_jobs_of_its_model(manager: JobManager) -> None:
    async def run_job(job: Job, _: float) -> dict[str, Any]:
        return {"by": job.model_name}

    other = await manager.submit("other", {})
    async with JobRunner(manager, "m", run_job, window=3):
        assert (await ended(manager, await manager.submit("m", {}))).result == {"by": "m"}
    job = await manager.get(other)
    assert job is not None
    assert job.status is JobStatus.QUEUED


async def test_the_timeout_counts_from_the_first_dispatch(manager: JobManager, clock: Clock) -> None:
    given: list[float] = []

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        given.append(timeout_s)
        return {}

    waited = await manager.submit("m", {})
    clock.now += 1_000_000  # a long backlog must not expire by waiting
    async with JobRunner(manager, "m", run_job, window=3, timeout_s=100):
        assert (await ended(manager, waited)).status is JobStatus.SUCCEEDED
    assert given == [pytest.approx(100)]


async def test_a_job_past_its_timeout_expires(manager: JobManager, clock: Clock) -> None:
    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        raise AssertionError("it must not run")

    job_id = await manager.submit("m", {})
    await manager.store.take("m", 1, clock())
    clock.now += 101
    await manager.store.requeue_running()
    async with JobRunner(manager, "m", run_job, window=3, timeout_s=100):
        job = await ended(manager, job_id)
    assert job.status is JobStatus.EXPIRED
    assert job.error == "the job did not finish within its timeout of 100 s"


async def test_a_full_scheduler_makes_a_job_wait_and_not_fail(manager: JobManager) -> None:
    refusals = 3

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise QueueFullError(1, 1)
        return {}

    async with JobRunner(manager, "m", run_job, window=3):
        assert (await ended(manager, await manager.submit("m", {}))).status is JobStatus.SUCCEEDED
    assert refusals == 0


async def test_an_end_that_cannot_be_stored_is_stored_later(
    manager: JobManager, store: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        return {}

    store.failures = 2
    async with JobRunner(manager, "m", run_job, window=3):
        assert (await ended(manager, await manager.submit("m", {}))).status is JobStatus.SUCCEEDED
    assert caplog.text.count("could not be stored") == 2


async def test_a_job_whose_scheduler_closed_stays_for_the_next_start(manager: JobManager) -> None:
    tried = anyio.Event()

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        tried.set()
        raise SchedulerClosedError("closing")

    job_id = await manager.submit("m", {})
    async with JobRunner(manager, "m", run_job, window=3):
        await tried.wait()
    job = await manager.get(job_id)
    assert job is not None
    assert job.status is JobStatus.RUNNING
    assert await manager.store.requeue_running() == 1


async def test_a_running_job_can_be_cancelled(manager: JobManager) -> None:
    started, stopped = anyio.Event(), anyio.Event()

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()
        return {}

    async with JobRunner(manager, "m", run_job, window=3):
        job_id = await manager.submit("m", {})
        await started.wait()
        job = await manager.cancel(job_id)
        await stopped.wait()
    assert job is not None
    assert job.status is JobStatus.CANCELLED
    assert (await ended(manager, job_id)).status is JobStatus.CANCELLED


async def test_cancelling_too_late_does_not_stop_the_delivery() -> None:
    """The job ends in the store just before it is cancelled there."""
    queue = InMemoryBackend()

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        return {}

    class Slow(Flaky):
        async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
            ended = await super().finish(outcomes)
            stored.set()
            await released.wait()
            return ended

    stored, released = anyio.Event(), anyio.Event()
    async with JobManager(Slow(), queue) as manager, JobRunner(manager, "m", run_job, window=3):
        job_id = await manager.submit("m", {}, success_queue="ok")
        await stored.wait()
        job = await manager.cancel(job_id)
        assert job is not None
        assert job.status is JobStatus.SUCCEEDED
        released.set()
        await queue.receive("ok")


async def test_waiting_for_a_job_ends_in_time(manager: JobManager) -> None:
    job_id = await manager.submit("m", {})
    job = await manager.get(job_id, wait_s=0.01)
    assert job is not None
    assert job.status is JobStatus.QUEUED
    assert await manager.get("unknown", wait_s=30) is None


async def test_results_are_removed_once_their_time_is_over(clock: Clock) -> None:
    store = MemoryJobStore()

    async def run_job(_: Job, timeout_s: float) -> dict[str, Any]:
        return {}

    swept = anyio.Event()
    original = store.remove_finished

    async def remove_finished(before: float) -> int:
        removed = await original(before)
        if removed:
            swept.set()
        return removed

    store.remove_finished = remove_finished  # type: ignore[method-assign]  # to know when the sweeper has been there
    async with JobManager(store, clock=clock, result_ttl_s=60, sweep_interval_s=0.001) as manager:
        async with JobRunner(manager, "m", run_job, window=3):
            job_id = await manager.submit("m", {})
            await ended(manager, job_id)
            clock.now += 59
            assert await manager.get(job_id) is not None
            clock.now += 2
            await swept.wait()
            assert await manager.get(job_id) is None


async def test_an_end_that_no_store_can_keep_fails_its_job_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(MemoryJobStore):
        async def finish(self, outcomes: Sequence[FinishedJob]) -> list[Job]:
            if any(outcome.result == {"n": 0} for outcome in outcomes):
                raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
            return await super().finish(outcomes)

    async def run_job(job: Job, _: float) -> dict[str, Any]:
        return job.message

    async with JobManager(Picky()) as manager, JobRunner(manager, "m", run_job, window=3):
        jobs = [await ended(manager, await manager.submit("m", {"n": n})) for n in range(3)]
    assert [job.status for job in jobs] == [JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.SUCCEEDED]
    assert jobs[0].error == "what became of the job could not be stored; the service's log tells why"
    assert "surrogates not allowed" in caplog.text


async def test_interactive_jobs_go_first_and_leave_bulk_ones_a_tenth_of_the_window(manager: JobManager) -> None:
    release = anyio.Event()
    taken: list[str] = []

    async def run_job(job: Job, _: float) -> dict[str, Any]:
        taken.append(job.priority)
        await release.wait()
        return {}

    for priority in (Priority.BULK, Priority.INTERACTIVE):
        for _ in range(30):
            await manager.submit("m", {}, priority=priority)
    async with JobRunner(manager, "m", run_job, window=20) as runner:
        while len(taken) < 20:
            await anyio.lowlevel.checkpoint()
        assert (taken.count("interactive"), taken.count("bulk"), runner.running) == (18, 2, 20)
        release.set()
    assert len(taken) == 60


async def test_whoever_waits_is_answered_when_waiting_is_over(manager: JobManager) -> None:
    job_id = await manager.submit("m", {})
    async with anyio.create_task_group() as task_group:
        for _ in range(2):
            task_group.start_soon(manager.get, job_id, 1e9)
        await anyio.wait_all_tasks_blocked()
        manager.stop_waiting()
    job = await manager.get(job_id, 1e9)
    assert job is not None
    assert job.status is JobStatus.QUEUED
