"""The life of a job: every path ends, no end is changed, and no delivery is forgotten; and both stores follow it."""

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import BaseModel, BeforeValidator, ConfigDict

from modalkit.batching import DeadlineExceededError, Failure, Outcome, Priority, Success
from modalkit.pipelines import AnyInput, AsyncInputModel, InferenceOutputModel
from modalkit.service.calls.wire_format import json_form
from modalkit.service.jobs import (
    DeliveryRecord,
    DeliveryStatus,
    IdempotencyKeyReusedError,
    Job,
    JobFilter,
    JobRetry,
    JobStatus,
    JobStore,
    MemoryJobStore,
    SqliteJobStore,
    life,
)
from modalkit.service.queue_backends import NotSentError, UndeliverableError
from tests.support import store_rules

SYSTEMIC = Failure(ConnectionError("the database is down"), is_systemic=True)
MAX_ATTEMPTS = 3


def queued(job_id: str = "a", message: dict[str, Any] | None = None, now: float = 1.0, **fields: Any) -> Job:
    request = AsyncInputModel(message=message or {"text": job_id}, **fields)
    item = AnyInput.model_validate(request.message)
    return life.new_job(
        request, job_id=job_id, model_name="m", message=item, priority=Priority.BULK, now=now, delivers=True
    )


def result_of(outcome: Outcome[InferenceOutputModel], now: float = 5.0, **fields: Any) -> tuple[JobStatus, str | None]:
    end = life.end_of(life.start_job(queued(**fields), 2.0), outcome, now)
    return end.status, end.error


def test_each_outcome_is_an_end() -> None:
    assert result_of(Success(InferenceOutputModel())) == (JobStatus.SUCCEEDED, None)
    assert result_of(Failure(ValueError("no"))) == (JobStatus.FAILED, "ValueError: no")
    status, error = result_of(Success(InferenceOutputModel(score=b"\xff")))
    assert (status, "is no JSON" in str(error)) == (JobStatus.FAILED, True)
    for late in (life.JobTimeoutError(3.0), DeadlineExceededError(3.0)):
        assert result_of(Failure(late)) == (JobStatus.EXPIRED, str(late))
        assert result_of(Failure(late), 11.0, expires_in=10.0) == (
            JobStatus.EXPIRED,
            "the job did not end within its expires_in of 10 s",
        )


def test_the_limit_of_a_result_counts_bytes_and_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "LARGEST_RESULT_BYTES", 1000)
    assert result_of(Success(InferenceOutputModel(text="e" * 600)))[0] is JobStatus.SUCCEEDED
    status, error = result_of(Success(InferenceOutputModel(text="é" * 600)))
    assert status is JobStatus.FAILED
    assert str(error).startswith("the result has 12")
    assert "store what is large elsewhere" in str(error)


def test_a_repetition_asks_for_the_same_and_has_the_same_digest() -> None:
    first = queued(success_queue="ok", meta={"n": 1}, idempotency_key="k")
    again = queued("b", {"text": "a"}, now=9.0, success_queue="ok", meta={"n": 1}, expires_in=7.0)
    assert life.is_same_request(first, again)
    assert life.request_digest(first) == life.request_digest(again)
    for field in ("model_name", "message_json", "success_queue", "failure_queue", "meta_json", "batch_id"):
        other = replace(first)
        setattr(other, field, "other")
        assert not life.is_same_request(first, other)
        assert life.request_digest(first) != life.request_digest(other)


def test_a_new_job_names_queues_only_where_results_are_sent_and_no_unprintable_characters() -> None:
    request = AsyncInputModel(message={"a": float("nan")}, success_queue="ok", expires_in=5.0)
    given: dict[str, Any] = {"message": request.message, "priority": Priority.BULK, "now": 1.0, "delivers": False}
    job = life.new_job(request, job_id="a", model_name="m", **given)
    assert (job.success_queue, job.message_json, job.expires_at) == (None, '{"a":NaN}', 6.0)
    with pytest.raises(ValueError, match="model_name must not hold unprintable characters"):
        life.new_job(request, job_id="a", model_name="m\x00", **given)


class Signal(BaseModel):
    """An item that its own validator makes of a list of numbers."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    signal: Annotated[np.ndarray[Any, Any], BeforeValidator(np.asarray)]
    noise: float | None = None


def test_an_item_with_an_array_is_stored_as_a_list_and_read_again_and_so_it_travels() -> None:
    item = Signal.model_validate({"signal": [1, 2.5]})
    given: dict[str, Any] = {"message": item, "now": 1.0, "delivers": False}
    job = life.new_job(AsyncInputModel(message={}), job_id="a", model_name="m", **given)
    assert job.message == json_form(item) == {"signal": [1.0, 2.5], "noise": None}
    assert Signal.model_validate(job.message).signal.tolist() == [1.0, 2.5]


def test_quarantined_groups_get_smaller_with_each_crash() -> None:
    assert [life.quarantine_group_size(crashes, 32) for crashes in range(1, 6)] == [32, 4, 1, 1, 1]
    assert [life.quarantine_group_size(crashes, 3) for crashes in range(1, 4)] == [3, 1, 1]


OUTCOMES = st.sampled_from(
    [Success(InferenceOutputModel()), Failure(ValueError("no")), Failure(DeadlineExceededError(1.0)), SYSTEMIC]
)
ERRORS = st.sampled_from([None, ConnectionError("down"), NotSentError("busy"), UndeliverableError("too large")])
QUEUES = st.sampled_from([None, "x", "y"])
SECONDS = st.integers(0, 20).map(float)


class OneJob(RuleBasedStateMachine):
    """One job, with what an engine does to it and what may happen to the engine, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.job = queued()
        self.due_at: float | None = None
        self.is_claimed = False
        self.end: tuple[Any, ...] | None = None

    def change(self, job: Job | None) -> bool:
        """Put the job in its next state, if there is one; its message is due from the moment it is to be sent."""
        if job is None:
            return False
        if job.delivery is DeliveryStatus.PENDING and self.job.delivery is not DeliveryStatus.PENDING:
            self.due_at = self.now
        self.job = job
        return True

    @initialize(success=QUEUES, failure=QUEUES, expires_in=st.none() | st.integers(1, 30).map(float))
    def accept(self, success: str | None, failure: str | None, expires_in: float | None) -> None:
        self.job = queued(success_queue=success, failure_queue=failure, expires_in=expires_in)

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.change(store_rules.expire_job(self.job, self.now))

    @precondition(lambda self: self.job.status is JobStatus.QUEUED and (self.job.retry_at or 0) <= self.now)
    @rule()
    def start(self) -> None:
        self.change(life.start_job(replace(self.job, retry_at=None), self.now))

    @rule(outcome=OUTCOMES)
    def finish(self, outcome: Outcome[InferenceOutputModel]) -> None:
        retry = life.retry_of(
            self.job,
            outcome,
            max_attempts=MAX_ATTEMPTS,
            deadline=life.deadline_of(self.job, timeout_s=50.0, now=self.now),
            now=self.now,
            backoff_s=float,
        )
        was_running = self.job.status is JobStatus.RUNNING
        if retry is not None:
            assert self.change(store_rules.requeue_job(self.job, retry)) is was_running
        else:
            end = life.end_of(self.job, outcome, self.now)
            may_expire = self.job.status is JobStatus.QUEUED and end.status is JobStatus.EXPIRED
            assert self.change(life.end_job(self.job, end)) is (was_running or may_expire)

    @rule()
    def cancel(self) -> None:
        had_ended = self.job.status.has_ended
        assert self.change(life.cancel_job(self.job, self.now)) is not had_ended

    @precondition(lambda self: self.due_at is not None and self.due_at <= self.now)
    @rule()
    def claim_delivery(self) -> None:
        self.due_at, self.is_claimed = None, True

    @precondition(lambda self: self.is_claimed)
    @rule(error=ERRORS)
    def send(self, error: Exception | None) -> None:
        self.is_claimed = False
        self.change(life.record_delivery(self.job, record := self.attempt(self.job, error)))
        self.due_at = record.due_at if record.status is DeliveryStatus.PENDING else None

    def attempt(self, job: Job, error: Exception | None) -> DeliveryRecord:
        return life.after_delivery_attempt(job, error, max_attempts=MAX_ATTEMPTS, now=self.now, backoff_s=float)

    @rule()
    def replay(self) -> None:
        was_undelivered = self.job.delivery is DeliveryStatus.UNDELIVERED
        assert self.change(store_rules.replay_delivery(self.job)) is was_undelivered

    @rule()
    def crash(self) -> None:
        self.change(store_rules.recover_job(self.job, self.now))
        if self.is_claimed:
            self.is_claimed = False
            self.change(store_rules.recover_delivery(self.job))
            self.due_at = self.now if self.job.delivery is DeliveryStatus.PENDING else None

    @invariant()
    def no_end_is_changed(self) -> None:
        job = self.job
        if self.end is not None:
            assert self.end == (job.status, job.result_json, job.error, job.finished_at, job.attempts)
        elif job.status.has_ended:
            self.end = (job.status, job.result_json, job.error, job.finished_at, job.attempts)
            assert job.finished_at is not None
            assert (job.status is JobStatus.SUCCEEDED) == (job.result_json is not None)

    @invariant()
    def no_delivery_is_forgotten(self) -> None:
        is_wanted = self.job.delivery_queue is not None
        assert (self.job.delivery is not DeliveryStatus.NONE) is is_wanted
        assert (self.job.delivery is DeliveryStatus.PENDING) is (self.is_claimed or self.due_at is not None)
        assert not (self.is_claimed and self.due_at is not None)

    @invariant()
    def every_path_ends(self) -> None:
        for step in (
            self.run_again,
            lambda job: store_rules.recover_job(job, self.now) or life.start_job(job, self.now),
        ):
            job, steps = self.job, 0
            while not job.status.has_ended:
                job, steps = step(job), steps + 1
                assert steps <= 2 * max(MAX_ATTEMPTS, life.MAX_CRASHES)
        fail: list[Callable[[Job], Job | None]] = [
            store_rules.recover_delivery,
            lambda job: life.record_delivery(job, self.attempt(job, ConnectionError("down"))),
        ]
        for attempt in fail:
            job, steps = self.job, 0
            while job.delivery is DeliveryStatus.PENDING:
                job, steps = attempt(job) or job, steps + 1
                assert steps <= max(MAX_ATTEMPTS, life.MAX_CRASHES)

    def run_again(self, job: Job) -> Job:
        """The job's next state where every run of it fails systemically, but no time limit ends it."""
        if job.status is JobStatus.QUEUED:
            return life.start_job(job, self.now)
        retry = life.retry_of(
            job, SYSTEMIC, max_attempts=MAX_ATTEMPTS, deadline=float("inf"), now=self.now, backoff_s=float
        )
        ended = life.end_job(job, life.end_of(job, SYSTEMIC, self.now)) if retry is None else None
        after = ended if retry is None else store_rules.requeue_job(job, retry)
        assert after is not None
        return after


class StoreFollowsLife(RuleBasedStateMachine):
    """A store next to a dictionary of jobs that changes by the rules of `life` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = self.make_store()
        self.runner.run(self.store.__aenter__())
        self.now = 1.0
        self.jobs: dict[str, Job] = {}
        self.due: dict[str, float] = {}
        self.claimed: set[str] = set()

    def make_store(self) -> JobStore:
        return MemoryJobStore()

    def teardown(self) -> None:
        self.runner.run(self.store.__aexit__(None, None, None))
        self.runner.close()
        self.folder.cleanup()

    def change(self, job: Job | None) -> bool:
        if job is None:
            return False
        was_pending = self.jobs[job.job_id].delivery is DeliveryStatus.PENDING
        if job.delivery is DeliveryStatus.PENDING and not was_pending:
            self.due[job.job_id] = self.now
        self.jobs[job.job_id] = job
        return True

    def pick(self, number: int) -> str:
        """The id of one of the jobs, or one that is unknown."""
        return f"{number % (len(self.jobs) + 1)}"

    @rule(success=QUEUES, failure=QUEUES, expires_in=st.none() | SECONDS.map(lambda s: s + 1), key=QUEUES)
    def add(self, success: str | None, failure: str | None, expires_in: float | None, key: str | None) -> None:
        job = queued(
            f"{len(self.jobs)}",
            {"text": "any"},
            self.now,
            success_queue=success,
            failure_queue=failure,
            expires_in=expires_in,
            idempotency_key=key,
        )
        (added,) = self.runner.run(self.store.add([job]))
        earlier = next((known for known in self.jobs.values() if key and known.idempotency_key == key), None)
        if earlier is None:
            assert added == job.job_id
            self.jobs[job.job_id] = job
        elif life.is_same_request(job, earlier):
            assert added == earlier.job_id
        else:
            assert isinstance(added, IdempotencyKeyReusedError)

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(limit=st.integers(1, 3))
    def claim(self, limit: int) -> None:
        claimed = self.runner.run(self.store.claim("m", limit, self.now))
        claimable = [
            job.job_id
            for job in self.jobs.values()
            if job.status is JobStatus.QUEUED and not job.crashes and job.retry_at is None
        ]
        assert [job.job_id for job in claimed] == claimable[:limit]
        for job in claimed:
            self.change(life.start_job(self.jobs[job.job_id], self.now))
            assert job == self.jobs[job.job_id]

    @rule(limit=st.integers(1, 3))
    def claim_quarantined(self, limit: int) -> None:
        claimed = self.runner.run(self.store.claim_quarantined("m", limit, self.now))
        quarantine = [job for job in self.jobs.values() if job.status is JobStatus.QUEUED and job.crashes]
        fewest = min((job.crashes for job in quarantine), default=0)
        group = [job.job_id for job in quarantine if job.crashes == fewest]
        assert [job.job_id for job in claimed] == group[: life.quarantine_group_size(fewest, limit)]
        for job in claimed:
            self.change(life.start_job(self.jobs[job.job_id], self.now))

    @rule(number=st.integers(0, 9), outcome=OUTCOMES)
    def finish(self, number: int, outcome: Outcome[InferenceOutputModel]) -> None:
        job_id = self.pick(number)
        job = self.jobs.get(job_id, queued(job_id))
        end = life.end_of(job, outcome, self.now)
        ended = self.runner.run(self.store.finish([end]))
        has_ended = job_id in self.jobs and self.change(life.end_job(job, end))
        assert ended == ([job_id] if has_ended else [])

    @rule(number=st.integers(0, 9), seconds=SECONDS)
    def requeue(self, number: int, seconds: float) -> None:
        retry = JobRetry(job_id=self.pick(number), retry_at=self.now + seconds, error="down")
        self.runner.run(self.store.requeue([retry]))
        if retry.job_id in self.jobs:
            self.change(store_rules.requeue_job(self.jobs[retry.job_id], retry))

    @rule(number=st.integers(0, 9))
    def return_claimed(self, number: int) -> None:
        job_id = self.pick(number)
        self.runner.run(self.store.return_claimed([job_id]))
        if job_id in self.jobs:
            self.change(store_rules.return_job(self.jobs[job_id]))

    @rule()
    def release_retries(self) -> None:
        next_at = self.runner.run(self.store.release_retries("m", self.now))
        for job in self.jobs.values():
            if job.retry_at is not None and job.retry_at <= self.now:
                self.jobs[job.job_id] = replace(job, retry_at=None)
        assert next_at == min((job.retry_at for job in self.jobs.values() if job.retry_at is not None), default=None)

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        job_id = self.pick(number)
        job = self.runner.run(self.store.cancel(job_id, self.now))
        if job_id in self.jobs:
            self.change(life.cancel_job(self.jobs[job_id], self.now))
        assert job == self.jobs.get(job_id)

    @rule()
    def expire(self) -> None:
        expired = self.runner.run(self.store.expire(99, self.now))
        jobs = list(self.jobs.values())
        assert {job.job_id for job in expired} == {
            job.job_id for job in jobs if self.change(store_rules.expire_job(job, self.now))
        }

    @rule()
    def claim_deliveries(self) -> None:
        claimed = self.runner.run(self.store.claim_deliveries(99, self.now, queue_limits={}, queue_limit=99))
        due = [i for i, due_at in self.due.items() if due_at <= self.now and not self.jobs[i].delivery_crashes]
        self.expect_claimed(claimed, due)

    @rule()
    def claim_quarantined_deliveries(self) -> None:
        claimed = self.runner.run(self.store.claim_quarantined_deliveries(2))
        quarantine = sorted((self.jobs[i].delivery_crashes, int(i)) for i in self.due if self.jobs[i].delivery_crashes)
        group = [f"{number}" for crashes, number in quarantine if crashes == quarantine[0][0]]
        size = life.quarantine_group_size(quarantine[0][0], 2) if quarantine else 0
        self.expect_claimed(claimed, group[:size])

    def expect_claimed(self, claimed: Any, job_ids: list[str]) -> None:
        assert sorted(job.job_id for job in claimed) == sorted(job_ids)
        for job in claimed:
            assert job == self.jobs[job.job_id]
            del self.due[job.job_id]
            self.claimed.add(job.job_id)

    @precondition(lambda self: self.claimed)
    @rule(number=st.integers(0, 9), error=ERRORS)
    def record_delivery(self, number: int, error: Exception | None) -> None:
        job = self.jobs[sorted(self.claimed)[number % len(self.claimed)]]
        record = life.after_delivery_attempt(job, error, max_attempts=MAX_ATTEMPTS, now=self.now, backoff_s=float)
        self.runner.run(self.store.record_deliveries([record]))
        self.claimed.remove(job.job_id)
        self.change(life.record_delivery(job, record))
        if record.status is DeliveryStatus.PENDING:
            self.due[job.job_id] = record.due_at

    @rule(number=st.integers(0, 9), everything=st.booleans())
    def replay(self, number: int, everything: bool) -> None:
        chosen = list(self.jobs) if everything else [self.pick(number)] * 2
        replayed = self.runner.run(self.store.replay(None if everything else chosen, self.now))
        jobs = [self.jobs[job_id] for job_id in dict.fromkeys(chosen) if job_id in self.jobs]
        assert replayed == sum(self.change(store_rules.replay_delivery(job)) for job in jobs)

    @rule(number=st.integers(0, 9), everything=st.booleans())
    def retry(self, number: int, everything: bool) -> None:
        chosen = list(self.jobs) if everything else [self.pick(number)] * 2
        retried = self.runner.run(self.store.retry(None if everything else chosen, JobFilter(), self.now))
        may = [job_id for job_id in self.jobs if job_id in chosen]
        assert retried == [job_id for job_id in may if self.change(store_rules.retry_job(self.jobs[job_id], self.now))]

    @rule()
    def recover(self) -> None:
        recovery = self.runner.run(self.store.recover(self.now))
        before = dict(self.jobs)
        for job_id in self.claimed:
            self.change(store_rules.recover_delivery(before[job_id]))
            if self.jobs[job_id].delivery is DeliveryStatus.PENDING:
                self.due[job_id] = self.now
        self.claimed.clear()
        recovered = [i for i, job in self.jobs.items() if self.change(store_rules.recover_job(job, self.now))]
        assert recovery.requeued == sum(self.jobs[i].status is JobStatus.QUEUED for i in recovered)
        assert list(recovery.failed) == [i for i in recovered if self.jobs[i].status is JobStatus.FAILED]
        undelivered = DeliveryStatus.UNDELIVERED
        changed = [i for i in before if self.jobs[i].delivery is undelivered is not before[i].delivery]
        assert sorted(recovery.undelivered) == sorted(changed)

    @rule(times=st.integers(1, 6))
    def crash_again_and_again(self, times: int) -> None:
        for _ in range(times):
            self.claim_quarantined(3)
            self.claim_quarantined_deliveries()
            self.recover()

    @invariant()
    def the_store_has_the_jobs_as_the_rules_say(self) -> None:
        for job_id, job in self.jobs.items():
            assert self.runner.run(self.store.get(job_id)) == job
        counts = self.runner.run(self.store.counts())
        statuses, deliveries = [job.status for job in self.jobs.values()], [job.delivery for job in self.jobs.values()]
        assert counts.statuses == {status: statuses.count(status) for status in JobStatus}
        assert counts.deliveries == {delivery: deliveries.count(delivery) for delivery in DeliveryStatus}


class SqliteFollowsLife(StoreFollowsLife):
    """The same of the store on disk."""

    def make_store(self) -> JobStore:
        return SqliteJobStore(Path(self.folder.name) / "jobs.db")


TestOneJob = OneJob.TestCase
TestOneJob.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMemoryStore = StoreFollowsLife.TestCase
TestMemoryStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSqliteStore = SqliteFollowsLife.TestCase
TestSqliteStore.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
