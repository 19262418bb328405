"""What the stores do to jobs by SQL, as functions of one job: the stores are tested against these."""

from dataclasses import replace

from modalkit.service.jobs.life import (
    TOO_MANY_CRASHES,
    TOO_MANY_DELIVERY_CRASHES,
    end_job,
    expires_in_passed,
    has_crashed_too_often,
)
from modalkit.service.jobs.model import DeliveryStatus, Job, JobEnd, JobRetry, JobStatus


def requeue_job(job: Job, retry: JobRetry) -> Job | None:
    """This running job, queued to run again later. It leaves the quarantine, because a run of it has ended."""
    if job.status is not JobStatus.RUNNING:
        return None
    return replace(
        job,
        status=JobStatus.QUEUED,
        attempts=job.attempts + 1,
        retry_at=retry.retry_at,
        error=retry.error,
        crashes=0,
    )


def return_job(job: Job) -> Job | None:
    """This running job, queued as it was before it was claimed, because it did not begin."""
    if job.status is not JobStatus.RUNNING:
        return None
    has_run = job.attempts or job.crashes
    return replace(job, status=JobStatus.QUEUED, started_at=job.started_at if has_run else None)


def expire_job(job: Job, now: float) -> Job | None:
    """This queued job, expired, if its `expires_at` has come."""
    if job.status is not JobStatus.QUEUED or job.expires_at is None or job.expires_at > now:
        return None
    error = expires_in_passed(job.expires_at - job.created_at)
    return end_job(job, JobEnd(job_id=job.job_id, status=JobStatus.EXPIRED, error=error, finished_at=now))


def recover_job(job: Job, now: float) -> Job | None:
    """This running job after its process died: queued and quarantined, or failed after too many crashes."""
    if job.status is not JobStatus.RUNNING:
        return None
    crashed = replace(job, crashes=job.crashes + 1)
    if not has_crashed_too_often(crashed.crashes):
        return replace(crashed, status=JobStatus.QUEUED)
    failed = JobEnd(job_id=job.job_id, status=JobStatus.FAILED, error=TOO_MANY_CRASHES, finished_at=now)
    ended = end_job(crashed, failed) or crashed
    return replace(ended, attempts=job.attempts)  # a run that a crash cut short is no attempt


def recover_delivery(job: Job) -> Job | None:
    """This job after its process died during the delivery: quarantined, or undelivered after too many crashes."""
    if job.delivery is not DeliveryStatus.PENDING:
        return None
    crashes = job.delivery_crashes + 1
    if not has_crashed_too_often(crashes):
        return replace(job, delivery_crashes=crashes)
    return replace(
        job, delivery=DeliveryStatus.UNDELIVERED, delivery_error=TOO_MANY_DELIVERY_CRASHES, delivery_crashes=0
    )


def replay_delivery(job: Job) -> Job | None:
    """This undelivered job, its delivery pending again with all its attempts."""
    if job.delivery is not DeliveryStatus.UNDELIVERED:
        return None
    return replace(job, delivery=DeliveryStatus.PENDING, delivery_attempts=0)


def retry_job(job: Job, now: float) -> Job | None:
    """This failed, expired or cancelled job, queued once more as if it were new; None while its message is due.

    It has as long as at first until it expires.
    """
    if job.status not in (JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED):
        return None
    if job.delivery is DeliveryStatus.PENDING:
        return None
    return replace(
        job,
        status=JobStatus.QUEUED,
        error=None,
        created_at=now,
        started_at=None,
        finished_at=None,
        crashes=0,
        attempts=0,
        expires_at=None if job.expires_at is None else job.expires_at - job.created_at + now,
        delivery=DeliveryStatus.NONE,
        delivery_attempts=0,
        delivery_error=None,
        delivery_crashes=0,
    )
