"""The routes that show, cancel, replay and remove jobs."""

from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal, get_origin

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import Response
from pydantic import PositiveFloat
from pydantic_core import to_json

from modalkit.pipelines.iomodel import MAX_EXPIRES_IN_S
from modalkit.service.errors import UnknownJobError
from modalkit.service.gateway import Jobs
from modalkit.service.jobs import DeliveryStatus, Job, JobFilter, JobStatus
from modalkit.service.jobs.manager import JobManager
from modalkit.service.web.admission import Admission, reception_of
from modalkit.service.web.answers import PROBLEM_ANSWERS, JobDetails, JobPageView, Purged, Replayed, Retried, job_json
from modalkit.service.web.auth import caller_of
from modalkit.service.web.direct import DirectResponse, while_connected
from modalkit.service.web.events import EventStream, JobEvents
from modalkit.service.web.options import check_query
from modalkit.service.web.problems import ProblemError

JOB_PATH = "/jobs/{job_id}"
MAX_WAIT_S = 300.0
MAX_WATCHED_JOBS = 100

CANNOT_LIST = "the jobs cannot be listed: the engine that runs them keeps no list; ask for each by its id"
CANNOT_PURGE = "the jobs cannot be removed: the engine that runs them removes results by itself"
CANNOT_REPLAY = (
    "the engine that runs the jobs cannot send a result once more: it stays in GET /jobs/{job_id}; submit the job again"
)

CANNOT_RETRY = "only a failed, expired or cancelled job runs once more, and not while its message is to be sent"

EVENTS: dict[str, Any] = {
    "response_class": EventStream,
    "status_code": 200,
    "responses": {204: {"description": "All was seen already: do not connect again"}},
    "description": "`status` when a job changes, `piece` for each part of its result where the pipeline has "
    "`predict_stream`, and `result` when it has ended: then nothing more follows for it. The stream ends when all have "
    "ended. The data of `status` and `result` is the job; comments are sent in pauses.",
}
JobId = Annotated[str, Path(description="As given by /async/predict.")]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the job's end before answering.")]
Statuses = Annotated[list[JobStatus], Query(alias="status", description="Only jobs in one of these states.")]
Retryable = Annotated[
    list[Literal["failed", "expired", "cancelled"]],  # texts, because errors show members of an enumeration as code
    Query(alias="status", description="Only jobs in one of these states."),
]
Deliveries = Annotated[list[DeliveryStatus], Query(alias="delivery", description="Only jobs with such a delivery.")]
OfModel = Annotated[str | None, Query(alias="model_name", description="Only jobs of this model.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Maximum jobs in one answer.")]
Cursor = Annotated[int | None, Query(ge=0, lt=2**63, description="The `next_cursor` of the page before.")]
JobIds = Annotated[
    list[str], Query(alias="job_id", min_length=1, max_length=MAX_WATCHED_JOBS, description="The jobs to watch.")
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="The id of the last event that was seen; browsers send it.")
]
OfBatch = Annotated[str | None, Query(alias="batch_id", description="Only jobs of this batch.")]
OlderThan = Annotated[
    PositiveFloat | None, Query(le=MAX_EXPIRES_IN_S, description="Only jobs that ended so many seconds ago.")
]


def make_job_router(jobs: Jobs, admission: Admission) -> APIRouter:
    """The routes over `jobs`."""
    router = APIRouter(tags=["jobs"], dependencies=[Depends(refuse_unknown_query)], responses=PROBLEM_ANSWERS)
    administration = partial(administration_of, jobs)

    async def visible(request: Request, job_id: str) -> Job:
        """The job. Raises `UnknownJobError` for one of another key, as for one that does not exist."""
        job = await jobs.get(job_id)
        return _found(job_id, job if job is not None and caller_of(request).sees(job) else None)

    async def check(request: Request, job_id: str) -> None:
        """Raise what `visible` does, and `ProblemError` where there is no room for an answer, before anything is done.

        The answer after it is not refused: its client would not know what was done.
        """
        reception_of(request.scope).check_answer((await visible(request, job_id)).size_bytes)

    @router.get("/jobs", summary="List jobs, the newest first", response_model=JobPageView)
    async def list_jobs(
        request: Request,
        status: Statuses = [],  # noqa: B006  # FastAPI copies it
        delivery: Deliveries = [],  # noqa: B006  # as above
        model_name: OfModel = None,
        batch_id: OfBatch = None,
        limit: Limit = 100,
        cursor: Cursor = None,
    ) -> Response:
        owner = caller_of(request).visible_owner
        which = JobFilter(statuses=status, deliveries=delivery, model_name=model_name, batch_id=batch_id, owner=owner)
        page = await administration(CANNOT_LIST).page(limit, which, cursor)
        shown = await admission.map(partial(map, job_json), page.jobs)
        return DirectResponse(b'{"jobs":[%b],"next_cursor":%b}' % (b",".join(shown), to_json(page.next_cursor)))

    @router.delete("/jobs", summary="Remove jobs that have ended, with their results")
    async def purge_jobs(
        request: Request,
        status: Statuses = [],  # noqa: B006  # as above
        delivery: Deliveries = [],  # noqa: B006  # as above
        model_name: OfModel = None,
        batch_id: OfBatch = None,
        older_than: OlderThan = None,
    ) -> Purged:
        if not status and not delivery and batch_id is None and older_than is None:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "say which jobs to remove: by status, as in ?status=failed, by delivery, by batch_id, or by older_than "
                "(in seconds)",
            )
        manager = administration(CANNOT_PURGE)
        ended_before = None if older_than is None else manager.clock() - older_than
        which = JobFilter(
            statuses=status,
            deliveries=delivery,
            model_name=model_name,
            batch_id=batch_id,
            ended_before=ended_before,
            owner=caller_of(request).visible_owner,
        )
        return Purged(purged=await manager.purge(which))

    @router.post("/jobs/replay", summary="Send all undelivered results once more")
    async def replay_jobs(request: Request) -> Replayed:
        owner = caller_of(request).visible_owner
        return Replayed(replayed=await administration(CANNOT_REPLAY).replay(owner=owner))

    @router.post("/jobs/retry", summary="Run all jobs that failed once more")
    async def retry_jobs(
        request: Request,
        status: Retryable = ["failed"],  # noqa: B006  # as above
        model_name: OfModel = None,
        batch_id: OfBatch = None,
    ) -> Retried:
        owner = caller_of(request).visible_owner
        statuses = list(map(JobStatus, status))
        which = JobFilter(statuses=statuses, model_name=model_name, batch_id=batch_id, owner=owner)
        return Retried(retried=await administration(CANNOT_LIST).retry(None, which))

    @router.get("/jobs/events", summary="What happens to several jobs, as server-sent events", **EVENTS)
    async def watch_jobs(request: Request, job_id: JobIds, last_event_id: LastEventId = None) -> Response:
        return await watch(request, list(dict.fromkeys(job_id)), last_event_id)

    @router.get("/jobs/{job_id}/events", summary="What happens to a job, as server-sent events", **EVENTS)
    async def watch_job(request: Request, job_id: JobId, last_event_id: LastEventId = None) -> Response:
        return await watch(request, [job_id], last_event_id)

    async def watch(request: Request, job_ids: list[str], last_event_id: str | None) -> Response:
        for job_id in job_ids:
            await visible(request, job_id)
        events = JobEvents(jobs, job_ids, last_event_id, reception_of(request.scope))
        if events.are_all_seen:
            return Response(status_code=HTTPStatus.NO_CONTENT)  # so that a browser does not connect again
        return EventStream(events.make())

    @router.get(JOB_PATH, summary="What became of a job", response_model=JobDetails)
    async def get_job(request: Request, job_id: JobId, wait: Wait = 0.0) -> Response:
        if wait and not caller_of(request).sees_all_jobs:
            await visible(request, job_id)
        job = await while_connected(request, jobs.get(job_id, wait))
        return await _details(request, job_id, job if job is not None and caller_of(request).sees(job) else None)

    @router.delete(
        JOB_PATH,
        summary="Cancel a job that has not ended",
        response_model=JobDetails,
        description="A job that has ended stays as it is. The `status` of the answer says whether it was cancelled.",
    )
    async def cancel_job(request: Request, job_id: JobId) -> Response:
        await check(request, job_id)
        return await _details(request, job_id, await jobs.cancel(job_id), may_be_refused=False)

    @router.post("/jobs/{job_id}/replay", summary="Send an undelivered result once more", response_model=JobDetails)
    async def replay_job(request: Request, job_id: JobId) -> Response:
        manager = administration(CANNOT_REPLAY)
        await check(request, job_id)
        replayed = await manager.replay([job_id])
        job = await jobs.get(job_id)
        if job is not None and not replayed:
            raise ProblemError(
                HTTPStatus.CONFLICT,
                f"the delivery of job {job_id} is {job.delivery}; only an undelivered result can be sent once more",
            )
        return await _details(request, job_id, job, may_be_refused=False)

    @router.post("/jobs/{job_id}/retry", summary="Run a job that failed once more", response_model=JobDetails)
    async def retry_job(request: Request, job_id: JobId) -> Response:
        manager = administration(CANNOT_LIST)
        await check(request, job_id)
        retried = await manager.retry([job_id])
        job = await jobs.get(job_id)
        if job is not None and not retried:
            state = f"{job.status}, and its delivery {job.delivery}"
            raise ProblemError(HTTPStatus.CONFLICT, f"job {job_id} is {state}; {CANNOT_RETRY}")
        return await _details(request, job_id, job, may_be_refused=False)

    return router


def administration_of(jobs: Jobs, reason: str) -> JobManager:
    """The administration of jobs. Raises `ProblemError` with the `reason` where the engine has none."""
    if jobs.administration is None:
        raise ProblemError(HTTPStatus.NOT_IMPLEMENTED, reason)
    return jobs.administration


async def refuse_unknown_query(request: Request) -> None:
    """Raise `ProblemError` for a query parameter that the route does not have, or that is given twice."""
    annotations = {
        parameter.alias: parameter.field_info.annotation for parameter in request.scope["route"].dependant.query_params
    }
    check_query(request, annotations, [name for name, kind in annotations.items() if get_origin(kind) is list])


async def _details(request: Request, job_id: str, job: Job | None, *, may_be_refused: bool = True) -> Response:
    found, reception = _found(job_id, job), reception_of(request.scope)
    make = partial(job_json, found, JobDetails)
    content = await reception.write(found.size_bytes, make, may_be_refused=may_be_refused)
    return DirectResponse(content, may_be_refused=may_be_refused)


def _found(job_id: str, job: Job | None) -> Job:
    if job is None:
        raise UnknownJobError(job_id)
    return job
