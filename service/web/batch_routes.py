"""The routes of batches of jobs."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from modalkit.service.errors import UnknownBatchError
from modalkit.service.gateway import Jobs
from modalkit.service.jobs import JobBatchResult, JobFilter
from modalkit.service.jobs.batches import JobBatches
from modalkit.service.outputs import with_nulls
from modalkit.service.web.answers import NDJSON, PROBLEM_ANSWERS, BatchView, Cancelled, Purged
from modalkit.service.web.auth import caller_of
from modalkit.service.web.job_routes import CANNOT_LIST, administration_of, refuse_unknown_query
from modalkit.service.web.options import BATCH_ID_PATTERN, MAX_LINE

BatchId = Annotated[
    str, Path(pattern=BATCH_ID_PATTERN, description="The id that the jobs were submitted with, as `batch_id`.")
]
After = Annotated[int, Query(ge=0, le=MAX_LINE, description="Only lines after this one.")]
Ordered = Annotated[bool, Query(description="Whether results come in the order of lines, not as jobs end.")]
Wait = Annotated[bool, Query(description="Whether to wait for jobs that have not ended.")]


def make_batch_router(jobs: Jobs) -> APIRouter:
    """The routes over `jobs`."""
    router = APIRouter(tags=["batches"], dependencies=[Depends(refuse_unknown_query)], responses=PROBLEM_ANSWERS)

    def batches() -> JobBatches:
        return administration_of(jobs, CANNOT_LIST).batches

    async def visible_owner(request: Request, batch_id: str) -> str | None:
        """The owner of the jobs that the caller sees, None for all. Raises `UnknownBatchError` if there are none."""
        owner = caller_of(request).visible_owner
        if not await batches().exists(batch_id, owner):
            raise UnknownBatchError(batch_id)
        return owner

    @router.get("/batches/{batch_id}", summary="How far a batch is")
    async def get_batch(request: Request, batch_id: BatchId) -> BatchView:
        batch = await batches().get(batch_id, caller_of(request).visible_owner)
        if batch is None:
            raise UnknownBatchError(batch_id)
        return BatchView.model_validate(batch)

    @router.get(
        "/batches/{batch_id}/results",
        summary="The results of a batch, as a stream of lines",
        description="A line for each job that has ended; the answer ends once all that are stored have. With `after`, "
        "the line that was read last, a stream that was cut is read on. Empty lines are sent in pauses.",
        response_class=StreamingResponse,
        responses={200: {"content": {NDJSON: {"schema": {"$ref": "#/components/schemas/BatchLine"}}}}},
    )
    async def read_results(
        request: Request, batch_id: BatchId, after: After = 0, ordered: Ordered = True, wait: Wait = True
    ) -> StreamingResponse:
        owner = await visible_owner(request, batch_id)
        if ordered:
            results = batches().results_by_line(batch_id, owner, after=after, wait=wait)
        else:
            results = batches().results_as_they_end(batch_id, owner, wait=wait)

        async def lines() -> AsyncIterator[bytes]:
            async for some in results:
                yield b"".join(_line_of(result) for result in some if ordered or result.line > after) or b"\n"

        return StreamingResponse(lines(), media_type=NDJSON)

    @router.post("/batches/{batch_id}/cancel", summary="Cancel the jobs of a batch that have not ended")
    async def cancel_batch(request: Request, batch_id: BatchId) -> Cancelled:
        return Cancelled(cancelled=await batches().cancel(batch_id, await visible_owner(request, batch_id)))

    @router.delete("/batches/{batch_id}", summary="Remove the jobs of a batch that have ended, with their results")
    async def purge_batch(request: Request, batch_id: BatchId) -> Purged:
        which = JobFilter(batch_id=batch_id, owner=await visible_owner(request, batch_id))
        return Purged(purged=await administration_of(jobs, CANNOT_LIST).purge(which))

    return router


def _line_of(result: JobBatchResult) -> bytes:
    """A line of the stream, joined from JSON texts as they are stored: `BatchLine` has its fields."""
    return b'{"line":%d,"job_id":%s,"status":"%s","result":%s,"error":%s,"meta":%s}\n' % (
        result.line,
        to_json(result.job_id),
        result.status.value.encode(),
        b"null" if result.result_json is None else result.result_json.encode(),
        to_json(result.error),
        with_nulls(result.meta_json.encode()),
    )
