"""The files and batches of clients of OpenAI's API, kept in the job store.

A line of an input file names an endpoint of ours: ``/sync/predict``, whose body is an item and perhaps `model`, or
``/v1/embeddings``, whose body has one text as `input`. Output files are made of the results when they are read.
"""

import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

import anyio
from pydantic_core import from_json, to_json
from starlette.datastructures import UploadFile

from modalkit.service.gateway import Gateway
from modalkit.service.jobs import JobBatchResult, JobStatus
from modalkit.service.jobs.manager import JobManager
from modalkit.service.settings import RequestConfig
from modalkit.service.web.adapters.openai_shapes import (
    BatchError,
    BatchErrors,
    BatchObject,
    FileObject,
    NewBatch,
    RequestCounts,
)
from modalkit.service.web.adapters.openai_submission import (
    BATCH,
    EMBEDDINGS,
    WINDOW_S,
    BatchRecord,
    Submissions,
    check_room,
    parts_of,
)
from modalkit.service.web.adapters.tasks import EMBEDDING
from modalkit.service.web.auth import Caller
from modalkit.service.web.problems import ProblemError

PART_BYTES = 2**20
FILE, OUTPUT, ERRORS = "file-", "file-output-", "file-errors-"
"""The beginnings of ids. Those of output files end as the id of their batch does."""


class KeptBatches:
    """The files and batches that one caller sees, and those it makes."""

    def __init__(
        self,
        administration: JobManager,
        gateway: Gateway,
        caller: Caller,
        limits: RequestConfig,
        submissions: Submissions,
    ) -> None:
        self.documents, self.visible_owner = administration.documents, caller.visible_owner
        self._administration, self._batches = administration, administration.batches
        self._gateway, self._caller = gateway, caller
        self._limits, self._submissions = limits, submissions
        self._clock = administration.clock  # which removes documents

    async def check_room(self, more_bytes: int) -> None:
        """Raise `ProblemError` where the files would be larger in all than they may, with so many more bytes."""
        await check_room(self.documents, self._limits, more_bytes)

    # Files.

    async def add_file(self, file: UploadFile) -> FileObject:
        """Store an uploaded file; its description last, so that a file that is there is whole."""
        file_id, number, size = f"{FILE}{uuid.uuid4().hex}", 0, 0
        try:
            while part := await file.read(PART_BYTES):
                number, size = number + 1, size + len(part)
                await self._put(file_id, part, number)
            name = (file.filename or "requests.jsonl").encode(errors="replace").decode()  # JSON holds no half of a pair
            added = FileObject(id=file_id, bytes=size, created_at=int(self._clock()), filename=name)
            await self._put(file_id, to_json(added))
        except BaseException:
            with anyio.CancelScope(shield=True):  # else its parts would count, and could not be removed
                await self.documents.remove_document(file_id)
            raise
        return added

    async def file(self, file_id: str) -> FileObject:
        """A file, uploaded or made of results. Raises `ProblemError`."""
        batch = await self._batch_of(file_id)
        if batch is None:
            return FileObject.model_validate_json(await self._read(FILE, file_id))
        size = sum([len(part) async for part in self.content(file_id)])
        created_at = batch.completed_at or batch.expired_at or batch.created_at
        name = f"{file_id}.jsonl"
        return FileObject(id=file_id, bytes=size, created_at=created_at, filename=name, purpose="batch_output")

    async def check_file(self, file_id: str) -> None:
        """Raise `ProblemError` where there is no such file; cheaper than `file`, which reads all results."""
        if await self._batch_of(file_id) is None:
            await self._read(FILE, file_id)

    async def _batch_of(self, file_id: str) -> BatchObject | None:
        """The batch whose results a file has; None for any other file."""
        for beginning in (OUTPUT, ERRORS):
            if file_id.startswith(beginning):
                batch = await self.batch(BATCH + file_id.removeprefix(beginning))
                return batch if file_id in (batch.output_file_id, batch.error_file_id) else None
        return None

    async def remove_file(self, file_id: str) -> None:
        """Remove an uploaded file; those of results go with their jobs. Raises `ProblemError`."""
        if (batch := await self._batch_of(file_id)) is not None:
            detail = f"{file_id} is made of the results of a batch: remove these by DELETE /batches/{batch.id}"
            raise ProblemError(HTTPStatus.CONFLICT, detail)
        await self._read(FILE, file_id)
        if (batch_id := self._submissions.batch_of_file(file_id)) is not None:
            detail = f"{file_id} is still read: remove it once {batch_id} is no longer `validating`"
            raise ProblemError(HTTPStatus.CONFLICT, detail)
        await self.documents.remove_document(file_id)

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """The content of a file that is there."""
        for beginning in (OUTPUT, ERRORS):
            if file_id.startswith(beginning):
                async for part in self._results(file_id.removeprefix(beginning), failed=beginning == ERRORS):
                    yield part
                return
        async for part in self._parts(file_id):
            yield part

    def _parts(self, document_id: str) -> AsyncIterator[bytes]:
        return parts_of(self.documents, document_id, self.visible_owner)

    async def _results(self, ending: str, *, failed: bool) -> AsyncIterator[bytes]:
        batch_id = BATCH + ending
        record = await self._record(batch_id)
        if failed:
            async for part in self._parts(batch_id):
                yield part
        async for results in self._batches.results_by_line(batch_id, self.visible_owner, wait=False):
            chosen = [each for each in results if (each.status is not JobStatus.SUCCEEDED) == failed]
            yield b"".join(to_json(_answer(each, record.new.endpoint)) + b"\n" for each in chosen)

    # Batches.

    async def create(self, new: NewBatch) -> BatchObject:
        """Store a batch, and begin to submit the requests of its file.

        Raises `ProblemError`, also where the caller is over its limit of items.
        """
        self._caller.take_items(0)
        await self._read(FILE, new.input_file_id)
        if new.endpoint == EMBEDDINGS and not EMBEDDING.models_of(self._gateway.models):
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "endpoint: there is no model for embeddings")
        batch_id = f"{BATCH}{uuid.uuid4().hex}"
        record = BatchRecord(new=new, created_at=int(self._clock()), owner=self._caller.owner, left=None)
        await self._put(batch_id, to_json(record))
        self._submissions.start(self._administration, batch_id, record, self._caller)
        return await self.batch(batch_id)

    async def batch(self, batch_id: str) -> BatchObject:
        """A batch as it is now. Raises `ProblemError`."""
        # Before the jobs are counted: while some are left, it has not ended.
        record = await self._record(batch_id)
        has_left = record.left != 0
        if has_left and not record.is_stopped:
            self._submissions.start(self._administration, batch_id, record)
        # Before the record: a cancellation stores its time there first, so it is not overwritten below.
        batch = await self._batches.get(batch_id, self.visible_owner)
        record = await self._record(batch_id)
        found = BatchObject(
            id=batch_id,
            created_at=record.created_at,
            expires_at=record.created_at + WINDOW_S,
            **record.new.model_dump(),
        )
        if record.errors:
            failed_at = record.failed_at or record.created_at
            return found.model_copy(
                update={"status": "failed", "errors": BatchErrors(data=record.errors), "failed_at": failed_at}
            )
        counts: Mapping[JobStatus, int] = {} if batch is None else batch.statuses
        completed, expired = counts.get(JobStatus.SUCCEEDED, 0), counts.get(JobStatus.EXPIRED, 0)
        failed = counts.get(JobStatus.FAILED, 0) + expired + record.refused
        changes: dict[str, Any] = {
            "in_progress_at": record.created_at,
            "cancelling_at": record.cancelled_at,
            "request_counts": RequestCounts(total=record.total, completed=completed, failed=failed),
        }
        if has_left and record.cancelled_at is None:
            return found.model_copy(update=changes | {"status": "validating"})
        if batch is not None and batch.active:
            changes["status"] = "in_progress" if record.cancelled_at is None else "cancelling"
            return found.model_copy(update=changes)
        removed = max(0, record.total - (record.left or 0) - record.refused - sum(counts.values()))
        ended_at = record.cancelled_at or record.created_at
        if batch is not None and batch.finished_at is not None:
            ended_at = int(batch.finished_at)
        ending = batch_id.removeprefix(BATCH)
        changes["output_file_id"] = f"{OUTPUT}{ending}" if completed else None
        changes["error_file_id"] = f"{ERRORS}{ending}" if failed or counts.get(JobStatus.CANCELLED) else None
        if counts.get(JobStatus.CANCELLED) or record.left != 0:
            changes |= {"status": "cancelled", "cancelled_at": ended_at}
        elif expired:
            changes |= {"status": "expired", "expired_at": ended_at}
        else:
            changes |= {"status": "completed", "completed_at": ended_at}
        if removed and record.ended is not None:
            files = {name: changes[name] for name in ("output_file_id", "error_file_id")}
            return record.ended.model_copy(update=files)
        if removed:
            message = f"the results of {removed} requests were removed (async_config.result_ttl after their end)"
            changes["errors"] = BatchErrors(data=[BatchError(code="results_removed", message=message)])
        ended = found.model_copy(update=changes)
        if not removed and ended != record.ended:
            await self._put(batch_id, to_json(record.model_copy(update={"ended": ended})))
        return ended

    async def cancel(self, batch_id: str) -> BatchObject:
        """Cancel what has not ended. Raises `ProblemError`."""
        if (await self.batch(batch_id)).status in ("validating", "in_progress", "cancelling"):
            async with self._submissions.stopped(batch_id):
                record = await self._record(batch_id)
                if not record.is_stopped:
                    record.cancelled_at = int(self._clock())
                    await self._put(batch_id, to_json(record))
            await self._batches.cancel(batch_id, self.visible_owner)
        return await self.batch(batch_id)

    async def _record(self, batch_id: str) -> BatchRecord:
        return BatchRecord.model_validate_json(await self._read(BATCH, batch_id))

    async def _read(self, beginning: str, document_id: str) -> bytes:
        if document_id.startswith(beginning):
            content = await self.documents.document_part(document_id, 0, self.visible_owner)
            if content is not None:
                return content
        raise ProblemError(HTTPStatus.NOT_FOUND, f"there is no {document_id!r:.100}: it is wrong, or was removed")

    async def _put(self, document_id: str, content: bytes, part: int = 0) -> None:
        await self.documents.put_document(document_id, part, self._caller.owner, content, self._clock())


def _answer(result: JobBatchResult, endpoint: str) -> dict[str, Any]:
    """A line of an output file, or of an error file. A job that a client added by itself may have no `custom_id`."""
    line = {"id": f"batch_req_{result.job_id}", "custom_id": from_json(result.meta_json).get("custom_id")}
    if result.status is not JobStatus.SUCCEEDED or result.result_json is None:
        error = {"code": result.status.value, "message": result.error or f"the request was {result.status}"}
        return line | {"response": None, "error": error}
    body = from_json(result.result_json)
    if endpoint == EMBEDDINGS:
        data = [{"object": "embedding", "index": 0, "embedding": body.get(EMBEDDING.gives)}]
        body = {"object": "list", "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}
    return line | {"response": {"status_code": 200, "request_id": result.job_id, "body": body}, "error": None}
