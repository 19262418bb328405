"""Jobs move from the store into the scheduler a window at a time, and every end of theirs is stored."""

import math
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio.abc import TaskStatus
from pydantic import BaseModel

from modalkit.batching import BatchTimeoutError, Failure, Priority, QueueFullError, SchedulerClosedError, Success
from modalkit.batching.pending import Withdraw
from modalkit.pipelines import AnyInput, AsyncInputModel, InferenceOutputModel
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import NotReadyError
from modalkit.service.jobs import (
    DeliveryStatus,
    IdempotencyKeyReusedError,
    Job,
    JobEnd,
    JobFilter,
    JobRetry,
    JobStatus,
    JobStore,
    JobStoreError,
    JobStoreFullError,
    MemoryJobStore,
    SqliteJobStore,
)
from modalkit.service.jobs.life import new_job
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.model import JobBatchLines
from modalkit.service.jobs.runner import FIRST_JOB_RETRY_S, JobOutcome, JobRunner
from modalkit.service.jobs.store import Added, Operation
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import AsyncConfig
from modalkit.testing import FakeClock

pytestmark = pytest.mark.anyio


class Flaky(MemoryJobStore):
    """Cannot store any end, or give out any job, so many times."""

    failures = 0

    def _maybe_fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise JobStoreError("the disk is full")

    async def finish(self, ends: Sequence[JobEnd], claimed: Collection[str] = ()) -> list[str]:
        self._maybe_fail()
        return await super().finish(ends, claimed)


class Engine:
    """Keeps the jobs that it is given until the test says what becomes of them; an open one answers at once."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.input_model = AnyInput
        self.is_open = is_open
        self.is_closed = False
        self.refusals = 0
        self.started: list[Job] = []
        self.groups: list[list[str]] = []
        self.raises: dict[int, Exception] = {}
        self.waiting: dict[str, Callable[[JobOutcome], None]] = {}
        self.queued: set[str] = set()
        """Those that wait for a batch."""
        self.change = anyio.Event()

    def start(self, job: Job, on_outcome: Callable[[JobOutcome], None]) -> Withdraw:
        if self.refusals:
            self.refusals -= 1
            raise QueueFullError(1, 1)
        if "bad" in job.message:
            raise ValueError("this is no item")
        self.started.append(job)
        self.waiting[job.job_id] = on_outcome
        self.change.set()
        if self.is_open:
            self.answer(job.job_id)

        def withdraw(*, only_waiting: bool = False) -> bool:
            if only_waiting and job.job_id not in self.queued:
                return False
            return self.waiting.pop(job.job_id, None) is not None

        return withdraw

    async def run_as_one_batch(self, jobs: Sequence[Job]) -> Sequence[JobOutcome]:
        assert not self.waiting
        self.groups.append([job.job_id for job in jobs])
        if len(self.groups) - 1 in self.raises:
            raise self.raises[len(self.groups) - 1]
        while not self.is_open:
            self.change = anyio.Event()
            await self.change.wait()
        return [Success(output_of(job)) for job in jobs]

    def answer(self, job_id: str, outcome: JobOutcome | None = None) -> None:
        """Tell what became of a job, by default its message as its result."""
        job = next(job for job in reversed(self.started) if job.job_id == job_id)
        if on_outcome := self.waiting.pop(job_id, None):
            on_outcome(Success(output_of(job)) if outcome is None else outcome)

    def open(self) -> None:
        """Answer what waits, and from now on at once."""
        self.is_open = True
        self.change.set()
        for job_id in list(self.waiting):
            self.answer(job_id)

    async def until_started(self, count: int) -> None:
        while len(self.started) < count:
            self.change = anyio.Event()
            await self.change.wait()


def output_of(job: Job) -> InferenceOutputModel:
    return InferenceOutputModel(**job.message)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store() -> Flaky:
    return Flaky()


@pytest.fixture
async def manager(store: Flaky, clock: FakeClock) -> AsyncIterator[JobManager]:
    async with JobManager(store, clock=clock, result_ttl_s=60, sweep_interval_s=0.001) as opened:
        for model_name in ("m", "other"):
            opened.attach(model_name, NoFeed(store))
        yield opened


class NoFeed:
    """Lets jobs be submitted before a runner is there for them."""

    def __init__(self, store: JobStore, input_model: type[BaseModel] = AnyInput) -> None:
        self.add = store.add
        self.input_model = input_model

    def wake(self) -> None: ...

    def abandon(self, job_id: str) -> None: ...

    def close(self) -> None: ...


async def submit(
    manager: JobManager,
    message: dict[str, Any] | None = None,
    *,
    model_name: str = "m",
    priority: Priority = Priority.BULK,
    **fields: Any,
) -> str:
    request = AsyncInputModel(message=message or {}, **fields)
    (added,) = await manager.submit([request], model_name=model_name, priority=priority)
    assert isinstance(added, Success)
    return added.value


async def test_a_window_of_large_jobs_holds_fewer_of_them(manager: JobManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 500 jobs of 16 MiB would be in memory at once."""
    monkeypatch.setattr("modalkit.service.jobs.runner.MAX_WINDOW_BYTES", 1000)
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=100):
        for _ in range(5):
            await submit(manager, {"text": "x" * 600})
            await anyio.wait_all_tasks_blocked()
        assert len(engine.started) == 2
        engine.open()
        await engine.until_started(5)


async def ended(manager: JobManager, job_id: str) -> Job:
    job = await manager.get(job_id, wait_s=30)
    assert job is not None
    return job


async def test_never_more_than_the_window_is_claimed(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3) as runner:
        job_ids = [await submit(manager, {"n": n}) for n in range(20)]
        await engine.until_started(3)
        await anyio.wait_all_tasks_blocked()
        counts = (await manager.counts()).statuses
        assert (runner.running, counts[JobStatus.RUNNING], counts[JobStatus.QUEUED]) == (3, 3, 17)
        engine.answer(job_ids[1])
        await engine.until_started(4)
        assert [job.job_id for job in engine.started] == job_ids[:4]
        engine.open()
        jobs = [await ended(manager, job_id) for job_id in job_ids]
    assert [(job.result or {})["n"] for job in jobs] == list(range(20))


async def test_a_runner_takes_only_the_jobs_of_its_model(manager: JobManager) -> None:
    other = await submit(manager, model_name="other")
    async with JobRunner(manager, "m", Engine(), window=3):
        assert (await ended(manager, await submit(manager))).status is JobStatus.SUCCEEDED
    assert (await ended_or_not(manager, other)).status is JobStatus.QUEUED


async def ended_or_not(manager: JobManager, job_id: str) -> Job:
    job = await manager.get(job_id)
    assert job is not None
    return job


async def test_a_new_job_that_the_window_has_room_for_is_not_read_from_the_store(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3):
        await anyio.wait_all_tasks_blocked()
        requests = [AsyncInputModel(message={"n": n}) for n in range(5)]
        job_ids = [
            added.value for added in await manager.submit(requests, model_name="m") if isinstance(added, Success)
        ]
        assert [(job.job_id, type(job.item)) for job in engine.started] == [(each, AnyInput) for each in job_ids[:3]]
        statuses = [(await ended_or_not(manager, job_id)).status for job_id in job_ids]
        engine.open()
        jobs = [await ended(manager, job_id) for job_id in job_ids]
    assert statuses == [JobStatus.RUNNING] * 3 + [JobStatus.QUEUED] * 2
    assert [job.result for job in jobs] == [output_of(job).model_dump() for job in jobs]
    assert all(job.item is None for job in engine.started)  # which may take much memory


async def test_a_job_whose_submission_was_cancelled_runs_if_it_was_stored() -> None:
    stored, released = anyio.Event(), anyio.Event()

    class Slow(MemoryJobStore):
        async def add_each(self, lists: Sequence[Sequence[Job]]) -> list[Added | Exception]:
            added = await super().add_each(lists)
            stored.set()
            await released.wait()
            return added

    engine = Engine()
    async with JobManager(Slow()) as manager, JobRunner(manager, "m", engine, window=3):
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as submitting:
            submitting.start_soon(submit, manager)
            await stored.wait()
            submitting.cancel_scope.cancel()
        released.set()
        await engine.until_started(1)
        await ended(manager, engine.started[0].job_id)


class Held(MemoryJobStore):
    """Stores new jobs once `released` is set, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.adding = 0
        self.released = anyio.Event()
        self.fails = False

    async def add_each(self, lists: Sequence[Sequence[Job]]) -> list[Added | Exception]:
        self.adding += len(lists)
        await self.released.wait()
        if self.fails:
            raise JobStoreError("the disk is full")
        return await super().add_each(lists)


async def test_a_runner_closes_while_a_job_is_submitted_that_cannot_be_stored() -> None:
    store = Held()
    store.fails = True
    async with JobManager(store) as manager, anyio.create_task_group() as submitting:
        async with JobRunner(manager, "m", Engine(), window=3):
            await anyio.wait_all_tasks_blocked()
            submitting.start_soon(_submit_in_vain, manager)
            await anyio.wait_all_tasks_blocked()
            submitting.start_soon(_release_when_idle, store)


async def _submit_in_vain(manager: JobManager) -> None:
    with pytest.raises(JobStoreError, match="full"):
        await submit(manager)


async def _release_when_idle(store: Held) -> None:
    await anyio.wait_all_tasks_blocked()
    store.released.set()


async def test_jobs_that_are_submitted_together_are_stored_in_one_step_and_fail_alone() -> None:
    lists = list[int]()

    class Counting(MemoryJobStore):
        async def add_each(self, lists_of_jobs: Sequence[Sequence[Job]]) -> list[Added | Exception]:
            lists.append(len(lists_of_jobs))
            return await super().add_each(lists_of_jobs)

    outcomes = list[str]()

    async def submit_one(manager: JobManager) -> None:
        try:
            outcomes.append(await submit(manager))
        except JobStoreFullError:
            outcomes.append("full")

    engine = Engine()
    async with JobManager(Counting(max_jobs=3)) as manager, JobRunner(manager, "m", engine, window=9):
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as submitting:
            for _ in range(5):
                submitting.start_soon(submit_one, manager)
        await engine.until_started(3)
    assert lists == [5]
    assert outcomes.count("full") == 2


async def test_jobs_of_a_list_whose_making_outlasts_the_runner_are_stored() -> None:
    async with JobManager(MemoryJobStore()) as manager:
        async with JobRunner(manager, "m", Engine(), window=3) as runner:
            pass
        job = new_job(AsyncInputModel(message={}), job_id="a", model_name="m", message={}, now=1.0, delivers=False)
        assert await runner.add([job]) == ["a"]
        stored = await manager.get("a")
        assert stored is not None
        assert stored.status is JobStatus.QUEUED


async def test_a_job_that_is_being_stored_when_an_exception_leaves_the_runner_is_told_to_its_caller() -> None:
    store, ids = Held(), list[str]()

    async def submit_one(manager: JobManager) -> None:
        ids.append(await submit(manager))

    async def release() -> None:
        await anyio.wait_all_tasks_blocked()
        store.released.set()

    async def run(manager: JobManager) -> None:
        async with JobRunner(manager, "m", Engine(), window=3):
            await anyio.wait_all_tasks_blocked()
            group.start_soon(submit_one, manager)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(release)
            raise ZeroDivisionError

    async with JobManager(store) as manager, anyio.create_task_group() as group:
        with pytest.raises(ZeroDivisionError):
            await run(manager)
    async with store:
        assert await store.get(ids[0]) is not None


async def test_large_jobs_that_are_submitted_together_fill_the_window_as_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modalkit.service.jobs.runner.MAX_WINDOW_BYTES", 1000)
    store, engine = Held(), Engine(is_open=False)
    async with JobManager(store) as manager, anyio.create_task_group() as submitting:
        async with JobRunner(manager, "m", engine, window=100):
            await anyio.wait_all_tasks_blocked()
            for _ in range(5):
                submitting.start_soon(submit, manager, {"text": "x" * 600})
            await anyio.wait_all_tasks_blocked()
            assert store.adding == 5
            store.released.set()
            await anyio.wait_all_tasks_blocked()
            assert len(engine.started) == 2
            engine.open()
            await engine.until_started(5)


async def test_jobs_run_that_were_retried_by_a_call_that_failed_half_way(manager: JobManager, store: Flaky) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3):
        job_id = await submit(manager)
        await engine.until_started(1)
        engine.answer(job_id, Failure(ValueError("bad")))
        await ended(manager, job_id)
        retry = store.retry

        async def fails_at_last(job_ids: Sequence[str] | None, which: JobFilter, now: float) -> list[str]:
            await retry(job_ids, which, now)
            raise JobStoreError("the disk is full")

        store.retry = fails_at_last  # type: ignore[method-assign]  # as if it had failed in a later step
        with pytest.raises(JobStoreError, match="full"):
            await manager.retry()
        engine.open()
        await engine.until_started(2)


@pytest.mark.parametrize("readings", range(1, 9))
async def test_a_retry_that_falls_due_between_two_readings_of_the_clock_holds_up_no_job(readings: int) -> None:
    left = math.inf

    def clock() -> float:
        """Stands still until so many `left` readings were made."""
        nonlocal left
        left -= 1
        return 1000.0 if left >= 0 else 1010.0

    engine = Engine(is_open=False)
    async with (
        JobManager(MemoryJobStore(), clock=clock, sweep_interval_s=1e6) as manager,
        JobRunner(manager, "m", engine, window=1, max_attempts=2, backoff_s=lambda _: 5.0),
    ):
        await anyio.wait_all_tasks_blocked()
        first = await submit(manager)
        engine.answer(first, Failure(ConnectionError("down"), is_systemic=True))
        await anyio.wait_all_tasks_blocked()
        job_ids = [first, await submit(manager), await submit(manager)]
        left = readings
        engine.open()
        for job_id in job_ids:
            await ended(manager, job_id)


async def test_a_repetition_with_the_same_idempotency_key_does_not_run(manager: JobManager) -> None:
    engine = Engine()
    async with JobRunner(manager, "m", engine, window=3) as runner:
        await anyio.wait_all_tasks_blocked()
        job_ids = [await submit(manager, idempotency_key="k") for _ in range(2)]
        await ended(manager, job_ids[0])
        assert runner.running == 0
    assert len(engine.started) == len(set(job_ids)) == 1


class Text(BaseModel):
    text: str


class TextWithLanguage(Text):
    language: str | None = None


class TextOfLanguage(Text):
    language: str


async def test_a_repetition_is_known_after_the_input_model_has_got_an_optional_field(
    manager: JobManager, store: Flaky
) -> None:
    feed = NoFeed(store, Text)
    manager.attach("m", feed)
    first = await submit(manager, {"text": "a"}, idempotency_key="k")
    feed.input_model = TextWithLanguage
    assert await submit(manager, {"text": "a"}, idempotency_key="k") == first

    async def is_refused(message: dict[str, Any]) -> bool:
        (added,) = await manager.submit([AsyncInputModel(message=message, idempotency_key="k")], model_name="m")
        return isinstance(added, Failure) and isinstance(added.error, IdempotencyKeyReusedError)

    assert await is_refused({"text": "b"})
    assert await is_refused({"text": "a", "language": "en"})
    feed.input_model = TextOfLanguage  # by which the first message is not valid
    assert await is_refused({"text": "a", "language": "en"})


async def test_each_end_is_stored_as_it_was(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3):
        job_ids = [await submit(manager, {"n": n}) for n in range(3)]
        bad = await submit(manager, {"bad": True})
        await engine.until_started(3)
        engine.answer(job_ids[0], Failure(ValueError("not this one")))
        engine.answer(job_ids[1], Success(InferenceOutputModel(score=b"\xff")))
        engine.answer(job_ids[2])
        jobs = [await ended(manager, job_id) for job_id in (*job_ids, bad)]
    assert [job.status for job in jobs] == [*[JobStatus.FAILED] * 2, JobStatus.SUCCEEDED, JobStatus.FAILED]
    assert jobs[0].error == "ValueError: not this one"
    assert "the pipeline's output is no JSON" in str(jobs[1].error)
    assert jobs[3].error == "ValueError: this is no item"


async def test_the_timeout_counts_from_the_first_dispatch(manager: JobManager, clock: FakeClock) -> None:
    waited = await submit(manager)
    clock.advance(1_000_000)  # a long backlog must not expire by waiting
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3, timeout_s=100) as runner:
        await engine.until_started(1)
        clock.advance(99)
        runner.wake()
        await anyio.wait_all_tasks_blocked()
        assert (await ended_or_not(manager, waited)).status is JobStatus.RUNNING
        clock.advance(2)
        runner.wake()
        job = await ended(manager, waited)
    assert job.status is JobStatus.EXPIRED
    assert job.error == "the job did not finish within its timeout of 100 s (async_config.timeout)"
    assert not engine.waiting


async def test_a_job_expires_by_its_own_time_queued_or_running(manager: JobManager, clock: FakeClock) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=1) as runner:
        job_ids = [await submit(manager, expires_in=10) for _ in range(2)]
        await engine.until_started(1)
        clock.advance(11)
        runner.wake()
        jobs = [await ended(manager, job_id) for job_id in job_ids]
    assert [(job.status, job.error) for job in jobs] == [
        (JobStatus.EXPIRED, "the job did not end within its expires_in of 10 s")
    ] * 2
    assert len(engine.started) == 1


async def test_a_full_scheduler_makes_a_job_wait_and_not_fail(manager: JobManager) -> None:
    engine = Engine()
    engine.refusals = 3
    async with JobRunner(manager, "m", engine, window=3):
        assert (await ended(manager, await submit(manager))).status is JobStatus.SUCCEEDED
    assert engine.refusals == 0


async def test_an_end_that_cannot_be_stored_is_stored_later(
    manager: JobManager, store: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    store.failures = 2
    async with JobRunner(manager, "m", Engine(), window=3):
        assert (await ended(manager, await submit(manager))).status is JobStatus.SUCCEEDED
    assert caplog.text.count("could not be stored") == 2


async def test_jobs_that_ended_together_are_stored_together(manager: JobManager, store: Flaky) -> None:
    sizes: list[int] = []
    finish = store.finish

    async def counting(ends: Sequence[JobEnd], claimed: Collection[str] = ()) -> list[str]:
        sizes.append(len(ends))
        return await finish(ends, claimed)

    store.finish = counting  # type: ignore[method-assign]  # to see how often it is called
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=50):
        job_ids = [await submit(manager) for _ in range(50)]
        await engine.until_started(50)
        engine.open()
        for job_id in job_ids:
            await ended(manager, job_id)
    assert sizes == [50]


async def test_a_job_whose_scheduler_closed_stays_for_the_next_start(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=3):
        job_id = await submit(manager)
        await engine.until_started(1)
        engine.is_closed = True
        engine.answer(job_id, Failure(SchedulerClosedError("closing")))
    assert (await ended_or_not(manager, job_id)).status is JobStatus.RUNNING
    assert (await manager.store.recover(1.0)).requeued == 1


async def test_a_pipeline_whose_own_scheduler_is_closed_fails_its_job_and_no_other(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=1):
        job_id, after = await submit(manager), await submit(manager)
        await engine.until_started(1)
        engine.answer(job_id, Failure(SchedulerClosedError("one inside the pipeline is not open")))
        engine.open()
        assert (await ended(manager, job_id)).status is JobStatus.FAILED
        assert (await ended(manager, after)).status is JobStatus.SUCCEEDED


async def test_a_running_job_can_be_cancelled(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=1):
        job_id, after = await submit(manager), await submit(manager)
        await engine.until_started(1)
        job = await manager.cancel(job_id)
        await engine.until_started(2)
        assert job_id not in engine.waiting
        engine.open()
        assert (await ended(manager, after)).status is JobStatus.SUCCEEDED
    assert job is not None
    assert job.status is JobStatus.CANCELLED
    assert (await ended(manager, job_id)).status is JobStatus.CANCELLED


async def test_cancelling_too_late_does_not_stop_the_delivery() -> None:
    """The job ends in the store just before it is cancelled there."""
    queue = InMemoryBackend()

    class Slow(Flaky):
        async def finish(self, ends: Sequence[JobEnd], claimed: Collection[str] = ()) -> list[str]:
            ended = await super().finish(ends, claimed)
            stored.set()
            await released.wait()
            return ended

    stored, released = anyio.Event(), anyio.Event()
    async with JobManager(Slow(), queue) as manager, JobRunner(manager, "m", Engine(), window=3):
        job_id = await submit(manager, success_queue="ok")
        await stored.wait()
        job = await manager.cancel(job_id)
        assert job is not None
        assert job.status is JobStatus.SUCCEEDED
        released.set()
        await queue.receive("ok")


async def crashed(manager: JobManager, count: int) -> list[str]:
    """So many jobs that were running when a process died."""
    job_ids = [await submit(manager, {"n": n}) for n in range(count)]
    await manager.store.claim("m", count, manager.clock())
    await manager.store.recover(manager.clock())
    return job_ids


async def test_jobs_that_ran_at_a_crash_run_in_groups_apart_from_all_others(manager: JobManager) -> None:
    quarantined = await crashed(manager, 3)
    others = [await submit(manager) for _ in range(2)]
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=9, group_limit=2) as runner:
        await anyio.wait_all_tasks_blocked()
        assert (engine.groups, engine.started, runner.running) == ([quarantined[:2]], [], 2)
        engine.open()
        for job_id in (*quarantined, *others):
            assert (await ended(manager, job_id)).status is JobStatus.SUCCEEDED
    assert engine.groups == [quarantined[:2], quarantined[2:]]
    assert [job.job_id for job in engine.started] == others


async def test_between_two_groups_as_many_others_run_the_interactive_ones_first(manager: JobManager) -> None:
    quarantined = await crashed(manager, 4)
    bulk = [await submit(manager) for _ in range(30)]
    now = await submit(manager, priority=Priority.INTERACTIVE)
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=20, group_limit=2):
        await anyio.wait_all_tasks_blocked()
        engine.is_open = True
        engine.change.set()
        for job_id in quarantined:
            await ended(manager, job_id)
        first = [job.job_id for job in engine.started]
        assert first[:2] == [now, bulk[0]] or first[:2] == [bulk[0], now]
        assert len(first) <= 4, "the second group waits for no more than a group of others"
        for job_id in bulk:
            await ended(manager, job_id)


async def test_an_interactive_job_waits_for_one_group_after_a_crash_of_a_full_window(manager: JobManager) -> None:
    quarantined = await crashed(manager, 512)
    engine = Engine()
    before: list[int] = []
    start = engine.start

    def counting(job: Job, on_outcome: Callable[[JobOutcome], None]) -> Withdraw:
        if job.priority is Priority.INTERACTIVE:
            before.append(len(engine.groups))
        return start(job, on_outcome)

    engine.start = counting  # type: ignore[method-assign]  # to see what ran before it
    for _ in range(100):
        await submit(manager)
    now = await submit(manager, priority=Priority.INTERACTIVE)
    async with JobRunner(manager, "m", engine, window=512, group_limit=32):
        await ended(manager, now)
        for job_id in quarantined:
            await ended(manager, job_id)
    assert before == [1]
    assert [len(group) for group in engine.groups] == [32] * 16


async def test_a_group_that_raises_kills_nothing_and_its_jobs_run_on_as_others_do(manager: JobManager) -> None:
    quarantined = await crashed(manager, 3)
    engine = Engine()
    engine.raises = {0: ValueError("poison")}
    async with JobRunner(manager, "m", engine, window=9, group_limit=2):
        jobs = [await ended(manager, job_id) for job_id in quarantined]
    assert [job.status for job in jobs] == [JobStatus.SUCCEEDED] * 3
    assert engine.groups == [quarantined[:2], quarantined[2:]]
    assert [job.job_id for job in engine.started] == quarantined[:2]


async def test_jobs_of_a_group_that_hangs_run_one_by_one_in_the_scheduler(manager: JobManager) -> None:
    quarantined = await crashed(manager, 3)
    other = await submit(manager)
    engine = Engine()
    engine.raises = {0: BatchTimeoutError(1.0, 3)}
    async with JobRunner(manager, "m", engine, window=9, group_limit=3):
        jobs = [await ended(manager, job_id) for job_id in (*quarantined, other)]
    assert engine.groups == [quarantined]
    assert [job.job_id for job in engine.started] == [*quarantined, other]
    assert {job.status for job in jobs} == {JobStatus.SUCCEEDED}


async def test_jobs_of_a_group_that_hangs_end_before_a_clean_stop(manager: JobManager) -> None:
    """Otherwise the next start would count the stop as a crash of these jobs."""
    quarantined = await crashed(manager, 3)
    engine = Engine(is_open=False)
    engine.raises = {0: BatchTimeoutError(1.0, 3)}

    async def open_once_it_closes() -> None:
        await anyio.wait_all_tasks_blocked()
        engine.open()

    async with anyio.create_task_group() as task_group, JobRunner(manager, "m", engine, window=9, group_limit=3):
        await anyio.wait_all_tasks_blocked()
        task_group.start_soon(open_once_it_closes)
    for job_id in quarantined:
        assert (await ended(manager, job_id)).status is JobStatus.SUCCEEDED


async def test_a_job_that_is_cancelled_in_its_group_stays_cancelled_and_a_late_one_is_not_run(
    manager: JobManager, clock: FakeClock
) -> None:
    cancelled, late = await crashed(manager, 2)
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=9, timeout_s=30):
        await anyio.wait_all_tasks_blocked()
        await manager.cancel(cancelled)
        clock.advance(31)
        assert engine.groups == [[cancelled]]
        engine.open()
        job = await ended(manager, late)
    assert (job.status, job.error) == (
        JobStatus.EXPIRED,
        "the job did not finish within its timeout of 30 s (async_config.timeout)",
    )
    assert (await ended(manager, cancelled)).status is JobStatus.CANCELLED
    assert engine.groups == [[cancelled]]


async def test_of_two_models_one_at_a_time_runs_a_quarantined_group(manager: JobManager) -> None:
    (first,) = await crashed(manager, 1)
    second = await submit(manager, model_name="other")
    await manager.store.claim("other", 1, manager.clock())
    await manager.store.recover(manager.clock())
    engines = [Engine(is_open=False), Engine(is_open=False)]
    async with JobRunner(manager, "m", engines[0], window=9), JobRunner(manager, "other", engines[1], window=9):
        await anyio.wait_all_tasks_blocked()
        assert (await manager.counts()).statuses[JobStatus.RUNNING] == 1
        now, later = sorted(engines, key=lambda engine: len(engine.groups), reverse=True)
        assert (len(now.groups), later.groups) == (1, [])
        now.open()
        assert (await ended(manager, now.groups[0][0])).status is JobStatus.SUCCEEDED
        await anyio.wait_all_tasks_blocked()
        assert {*now.groups[0], *later.groups[0]} == {first, second}
        later.open()
        assert (await ended(manager, later.groups[0][0])).status is JobStatus.SUCCEEDED


SYSTEMIC = Failure(ConnectionError("the database is down"), is_systemic=True)


async def test_jobs_of_a_systemic_failure_run_again_later_until_they_succeed_or_are_out_of_attempts(
    manager: JobManager, clock: FakeClock
) -> None:
    waits: list[int] = []

    def backoff_s(attempt: int) -> float:
        waits.append(attempt)
        return 10.0 * attempt

    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=9, max_attempts=3, backoff_s=backoff_s) as runner:
        lucky, doomed = await submit(manager, {"n": 1}), await submit(manager, {"n": 2})
        for attempt in (1, 2):
            await engine.until_started(2 * attempt)
            engine.answer(doomed, SYSTEMIC)
            engine.answer(lucky, SYSTEMIC)
            await anyio.wait_all_tasks_blocked()
            job = await ended_or_not(manager, lucky)
            assert (job.status, job.attempts, job.retry_at) == (JobStatus.QUEUED, attempt, clock() + 10 * attempt)
            assert job.error == "ConnectionError: the database is down"
            clock.advance(10 * attempt - 1)
            runner.wake()
            await anyio.wait_all_tasks_blocked()
            assert len(engine.started) == 2 * attempt
            clock.advance(1)
            runner.wake()
        await engine.until_started(6)
        engine.answer(doomed, SYSTEMIC)
        engine.answer(lucky)
        jobs = [await ended(manager, job_id) for job_id in (lucky, doomed)]
    assert [(job.status, job.attempts, job.retry_at) for job in jobs] == [
        (JobStatus.SUCCEEDED, 3, None),
        (JobStatus.FAILED, 3, None),
    ]
    assert (jobs[0].error, jobs[1].error) == (None, "ConnectionError: the database is down")
    assert waits == [1, 1, 2, 2]


async def test_a_runner_sleeps_until_the_next_retry_is_due_also_one_of_an_earlier_process(manager: JobManager) -> None:
    job_id = await submit(manager)
    await manager.store.claim("m", 1, manager.clock())
    await manager.store.requeue([JobRetry(job_id=job_id, retry_at=manager.clock() + 0.02, error="down")])
    now, start_s = manager.clock(), anyio.current_time()
    manager.clock = lambda: now + anyio.current_time() - start_s
    async with JobRunner(manager, "m", Engine(), window=9):
        job = await ended(manager, job_id)
    assert (job.status, job.attempts) == (JobStatus.SUCCEEDED, 2)


async def test_one_attempt_means_that_no_job_runs_again(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=9, max_attempts=1):
        job_id = await submit(manager)
        await engine.until_started(1)
        engine.answer(job_id, SYSTEMIC)
        assert (await ended(manager, job_id)).status is JobStatus.FAILED


async def test_a_job_that_would_expire_before_it_runs_again_fails_with_its_error(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(
        manager, "m", engine, window=9, timeout_s=60, max_attempts=9, backoff_s=lambda attempt: 30.0 * attempt
    ):
        own, timeout = await submit(manager, expires_in=30), await submit(manager)
        await engine.until_started(2)
        engine.answer(own, SYSTEMIC)
        engine.answer(timeout, SYSTEMIC)
        job = await ended(manager, own)
        assert (job.status, job.error) == (JobStatus.FAILED, "ConnectionError: the database is down")
        await anyio.wait_all_tasks_blocked()
        assert (await ended_or_not(manager, timeout)).status is JobStatus.QUEUED
        engine.open()


async def test_a_job_that_waits_to_run_again_can_be_cancelled(manager: JobManager, clock: FakeClock) -> None:
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=9, max_attempts=9, backoff_s=lambda _: 10.0) as runner:
        job_id = await submit(manager)
        await engine.until_started(1)
        engine.answer(job_id, SYSTEMIC)
        await anyio.wait_all_tasks_blocked()
        await manager.cancel(job_id)
        clock.advance(11)
        runner.wake()
        await anyio.wait_all_tasks_blocked()
    assert len(engine.started) == 1
    assert (await ended(manager, job_id)).status is JobStatus.CANCELLED


async def test_a_draining_manager_leaves_the_jobs_that_have_not_begun_in_a_durable_store(
    manager: JobManager, store: Flaky
) -> None:
    """They are as they were, so that neither their timeout nor a count of crashes has begun."""
    store.durable = True
    engine = Engine(is_open=False)
    async with JobRunner(manager, "m", engine, window=2):
        running, waiting, stored = [await submit(manager) for _ in range(3)]
        await engine.until_started(2)
        engine.queued.add(waiting)
        manager.drain()
        while (await ended_or_not(manager, waiting)).status is not JobStatus.QUEUED:
            await anyio.wait_all_tasks_blocked()
        late = await submit(manager)
        engine.open()
    assert [job.job_id for job in engine.started] == [running, waiting]
    jobs = [await ended_or_not(manager, job_id) for job_id in (running, waiting, stored, late)]
    assert [job.status for job in jobs] == [JobStatus.SUCCEEDED, *[JobStatus.QUEUED] * 3]
    assert [(job.started_at, job.attempts, job.crashes) for job in jobs[1:]] == [(None, 0, 0)] * 3


@pytest.mark.parametrize("durable", [False, True])
async def test_jobs_that_wait_to_run_again_do_not_hold_up_the_exit(
    manager: JobManager, store: Flaky, durable: bool
) -> None:
    """Where they would be lost they run once more at once, for the last time; else they stay for the next start."""
    store.durable = durable
    engine = Engine(is_open=False)
    leave = anyio.Event()

    async def run_until_told() -> None:
        async with JobRunner(manager, "m", engine, window=9, max_attempts=9, backoff_s=lambda _: 1e3):
            await leave.wait()

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(run_until_told)
        waiting, running = await submit(manager), await submit(manager)
        await engine.until_started(2)
        engine.answer(waiting, SYSTEMIC)
        await anyio.wait_all_tasks_blocked()
        leave.set()
        await anyio.wait_all_tasks_blocked()
        engine.answer(running, SYSTEMIC)
        if not durable:
            await engine.until_started(3)
            engine.answer(waiting, SYSTEMIC)
    assert [job.job_id for job in engine.started] == [waiting, running, *([] if durable else [waiting])]
    jobs = [await ended_or_not(manager, job_id) for job_id in (waiting, running)]
    expected = (JobStatus.QUEUED, JobStatus.QUEUED) if durable else (JobStatus.FAILED, JobStatus.FAILED)
    assert tuple(job.status for job in jobs) == expected


def test_jobs_that_fail_together_last_through_a_minute_by_default() -> None:
    attempts = AsyncConfig().max_attempts
    for _ in range(50):
        waits = [backoff_with_jitter(attempt, first_s=FIRST_JOB_RETRY_S) for attempt in range(1, attempts)]
        assert 60 < 85 <= sum(waits) <= 170


async def test_a_store_that_fails_and_is_not_durable_does_not_hold_up_the_exit() -> None:
    class Gone(MemoryJobStore):
        async def claim_quarantined(self, model_name: str, limit: int, now: float) -> list[Job]:
            await anyio.lowlevel.checkpoint()
            raise JobStoreError("the server is gone")

        async def claim(self, model_name: str, limit: int, now: float, *, bulk_limit: int = 0) -> list[Job]:
            raise JobStoreError("the server is gone")

    with anyio.fail_after(10):
        async with JobManager(Gone()) as manager, JobRunner(manager, "m", Engine(), window=1):
            pass


async def test_ends_that_cannot_be_stored_keep_the_window_full(manager: JobManager, store: Flaky) -> None:
    store.failures = 10**6
    engine = Engine()
    async with JobRunner(manager, "m", engine, window=4):
        for _ in range(50):
            await submit(manager)
        await engine.until_started(4)
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert len(engine.started) == 4
        store.failures = 0
        await engine.until_started(50)
    assert (await manager.counts()).statuses[JobStatus.SUCCEEDED] == 50


async def test_jobs_are_accepted_only_while_a_runner_is_there_for_them(manager: JobManager) -> None:
    with pytest.raises(NotReadyError, match="'unknown' takes no requests now"):
        await submit(manager, model_name="unknown")
    async with JobRunner(manager, "m", Engine(), window=3):
        assert (await ended(manager, await submit(manager))).status is JobStatus.SUCCEEDED
    with pytest.raises(NotReadyError):
        await submit(manager)


async def test_waiting_for_a_job_ends_in_time(manager: JobManager) -> None:
    job_id = await submit(manager)
    job = await manager.get(job_id, wait_s=0.01)
    assert job is not None
    assert job.status is JobStatus.QUEUED
    assert await manager.get("unknown", wait_s=30) is None


async def test_results_are_removed_once_their_time_is_over(manager: JobManager, store: Flaky, clock: FakeClock) -> None:
    swept = anyio.Event()
    remove = store.remove_finished

    async def remove_finished(before: float) -> int:
        removed = await remove(before)
        if removed:
            swept.set()
        return removed

    store.remove_finished = remove_finished  # type: ignore[method-assign]  # to know when the sweeper has been there
    async with JobRunner(manager, "m", Engine(), window=3):
        job_id = await submit(manager)
        await ended(manager, job_id)
        clock.advance(59)
        assert await manager.get(job_id) is not None
        clock.advance(2)
        await swept.wait()
        assert await manager.get(job_id) is None


async def test_an_expired_job_is_delivered_to_its_failure_queue(clock: FakeClock) -> None:
    queue = InMemoryBackend()
    store = Flaky()
    async with JobManager(store, queue, clock=clock, sweep_interval_s=0.001) as manager:
        manager.attach("m", NoFeed(store))
        job_id = await submit(manager, failure_queue="bad", expires_in=5)
        clock.advance(6)
        assert job_id in await queue.receive("bad")


async def test_interactive_jobs_go_first_and_leave_bulk_ones_a_tenth_of_the_window(manager: JobManager) -> None:
    engine = Engine(is_open=False)
    for priority in (Priority.BULK, Priority.INTERACTIVE):
        for _ in range(30):
            await submit(manager, priority=priority)
    async with JobRunner(manager, "m", engine, window=20) as runner:
        await engine.until_started(20)
        claimed = [job.priority for job in engine.started]
        assert (claimed.count(Priority.INTERACTIVE), claimed.count(Priority.BULK), runner.running) == (18, 2, 20)
        engine.open()
    assert len(engine.started) == 60


async def test_callers_that_wait_are_answered_when_waiting_is_over(manager: JobManager) -> None:
    job_id = await submit(manager)
    async with anyio.create_task_group() as task_group:
        for _ in range(2):
            task_group.start_soon(manager.get, job_id, 1e9)
        await anyio.wait_all_tasks_blocked()
        manager.stop_waiting()
    job = await manager.get(job_id, 1e9)
    assert job is not None
    assert job.status is JobStatus.QUEUED


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # which runs tasks in their order
async def test_a_job_that_comes_as_the_runner_of_a_memory_store_is_left_still_runs() -> None:
    engine, ids = Engine(), list[str]()

    async def submit_late(manager: JobManager) -> None:
        ids.append(await submit(manager))

    async with JobManager(MemoryJobStore()) as manager:
        async with anyio.create_task_group() as group, JobRunner(manager, "m", engine, window=3):
            await anyio.wait_all_tasks_blocked()
            group.start_soon(submit_late, manager)  # it runs after the block
        job = await manager.get(ids[0])
    assert job is not None
    assert job.status is JobStatus.SUCCEEDED


async def test_results_that_an_earlier_configuration_left_are_undelivered_where_there_is_no_queue_backend() -> None:
    store = MemoryJobStore()
    async with store:
        await store.add([Job(job_id="a", model_name="m", message_json="{}", success_queue="reports", created_at=1.0)])
        await store.claim("m", 1, 2.0)
        await store.finish([JobEnd(job_id="a", status=JobStatus.SUCCEEDED, result_json="{}", finished_at=3.0)])
    async with JobManager(store, clock=lambda: 4.0) as manager:
        for _ in range(2):
            while (job := await ended_or_not(manager, "a")).delivery is DeliveryStatus.PENDING:
                await anyio.lowlevel.checkpoint()
            assert job.delivery is DeliveryStatus.UNDELIVERED
            assert "there is no queue backend: configure one" in str(job.delivery_error)
            assert await manager.replay() == 1
        while (await ended_or_not(manager, "a")).delivery is DeliveryStatus.PENDING:
            await anyio.lowlevel.checkpoint()
        assert await manager.purge(JobFilter()) == 1


class SlowDisk(SqliteJobStore):
    """Writes nothing between `hold` and `released`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.writing, self.released = threading.Event(), threading.Event()
        self.released.set()

    def hold(self) -> None:
        self.released.clear()
        self.writing.clear()

    def _transaction(self, operations: list[Operation]) -> list[Any]:
        self.writing.set()
        self.released.wait(60)
        return super()._transaction(operations)


@pytest.mark.parametrize("in_batch", [False, True])
async def test_a_cancellation_whose_caller_is_cancelled_is_told_to_all_and_frees_the_window(
    tmp_path: Path, in_batch: bool
) -> None:
    engine, store, seen = Engine(is_open=False), SlowDisk(tmp_path / "jobs.db"), list[JobStatus]()

    async def watch(manager: JobManager, *, task_status: TaskStatus[None]) -> None:
        async for job in manager.watch([job_id]):
            assert isinstance(job, Job)
            seen.append(job.status)
            if len(seen) == 1:
                task_status.started()

    async with JobManager(store) as manager, JobRunner(manager, "m", engine, window=3) as runner:
        lines = JobBatchLines("batch", [1])
        (added,) = await manager.submit([AsyncInputModel(message={})], model_name="m", batch=lines)
        assert isinstance(added, Success)
        job_id = added.value
        await engine.until_started(1)
        async with anyio.create_task_group() as watching:
            await watching.start(watch, manager)
            store.hold()
            async with anyio.create_task_group() as cancelling:
                if in_batch:
                    cancelling.start_soon(manager.batches.cancel, "batch")
                else:
                    cancelling.start_soon(manager.cancel, job_id)
                await anyio.to_thread.run_sync(store.writing.wait)
                cancelling.cancel_scope.cancel()
                store.released.set()
            with anyio.fail_after(10):
                await manager.get(job_id, wait_s=60)
                while seen[-1] is not JobStatus.CANCELLED:
                    await anyio.lowlevel.checkpoint()
        assert runner.running == 0


async def test_cancelling_a_batch_in_memory_lets_other_tasks_run_between_its_steps(
    manager: JobManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalkit.service.jobs.sqlite_many.ROWS_PER_STEP", 2)
    seen = set[int]()

    async def count_cancelled() -> None:
        while True:
            seen.add((await manager.counts()).statuses[JobStatus.CANCELLED])
            await anyio.lowlevel.checkpoint()

    lines = JobBatchLines("batch", range(20))
    await manager.submit([AsyncInputModel(message={})] * 20, model_name="m", batch=lines)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count_cancelled)
        assert await manager.batches.cancel("batch") == 20
        task_group.cancel_scope.cancel()
    assert seen & set(range(1, 20))


async def test_a_runner_that_is_left_detaches_no_later_one_of_its_model(manager: JobManager) -> None:
    leave, has_left = anyio.Event(), anyio.Event()

    async def run_earlier(*, task_status: TaskStatus[None]) -> None:
        async with JobRunner(manager, "m", Engine(), window=3):
            task_status.started()
            await leave.wait()
        has_left.set()

    async with anyio.create_task_group() as task_group:
        await task_group.start(run_earlier)
        async with JobRunner(manager, "m", Engine(), window=3):
            leave.set()
            await has_left.wait()
            assert (await ended(manager, await submit(manager))).status is JobStatus.SUCCEEDED
    with pytest.raises(NotReadyError):
        await submit(manager)


async def test_an_error_of_no_kind_of_the_store_reaches_its_callers_and_the_runner_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, store = Engine(), MemoryJobStore()
    async with JobManager(store) as manager, JobRunner(manager, "m", engine, window=3):
        await anyio.wait_all_tasks_blocked()
        with monkeypatch.context() as broken:
            broken.setattr(store, "_perform", None)  # which cannot be called
            with pytest.raises(TypeError):
                await submit(manager)
        assert await submit(manager)
