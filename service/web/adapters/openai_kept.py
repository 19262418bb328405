"""The files and batches of clients of OpenAI's API, kept in the job store.

A line of an input file names an endpoint of ours: ``/sync/predict``, whose body is an item and perhaps `model`, or
``/v1/embeddings``, whose body has one text as `input`. Output files are made of the results when they are read.
"""

import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import closing
from http import HTTPStatus
from typing import Any, Literal

import anyio
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json
from starlette.datastructures import UploadFile

from modalkit.batching import Failure
from modalkit.batching.errors import users_error
from modalkit.pipelines import AsyncInputModel
from modalkit.service.gateway import Gateway, Model, find_model
from modalkit.service.jobs import JobBatchLines, JobBatchResult, JobStatus
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
from modalkit.service.web.adapters.tasks import EMBEDDING
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser, check_keys
from modalkit.service.web.lines import Line, lines_of
from modalkit.service.web.problems import ProblemError, as_problem, invalid

PART_BYTES = 2**20
WINDOW_S = 86_400
MAX_SHOWN_ERRORS = 100
PREDICT, EMBEDDINGS = "/sync/predict", "/v1/embeddings"
FILE, BATCH, OUTPUT, ERRORS = "file-", "batch_", "file-output-", "file-errors-"
"""The beginnings of ids. Those of output files end as the id of their batch does."""


class _Record(BaseModel):
    """What is stored of a batch, besides its jobs."""

    new: NewBatch
    created_at: int
    total: int = 0
    errors: list[BatchError] = []
    refused: int = 0
    """Requests that became no job; their lines of the error file are the other parts of the document."""
    cancelled_at: int | None = None
    ended: BatchObject | None = None
    """The batch as it was when all its requests had ended; their jobs are removed before it."""


class _Request(BaseModel):
    """A line of an input file."""

    custom_id: str
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


class KeptBatches:
    """The files and batches that one caller sees, and those it makes."""

    def __init__(
        self,
        administration: JobManager,
        gateway: Gateway,
        caller: Caller,
        limits: RequestConfig,
        parser_of: Callable[[type[BaseModel]], BodyParser],
    ) -> None:
        self.documents, self.visible_owner = administration.documents, caller.visible_owner
        self._batches, self._gateway, self._caller = administration.batches, gateway, caller
        self._limits, self._parser_of = limits, parser_of
        self._clock = administration.clock  # which removes documents

    async def check_room(self, more_bytes: int) -> None:
        """Raise `ProblemError` where the files would be larger in all than they may, with so many more bytes."""
        if more_bytes + await self.documents.documents_bytes() > self._limits.max_stored_file_bytes:
            detail = f"the stored files would exceed {self._limits.max_stored_file_bytes} bytes in all"
            remedy = "remove files that are not needed, or raise request_config.max_stored_file_bytes"
            raise ProblemError(HTTPStatus.INSUFFICIENT_STORAGE, f"{detail}: {remedy}")

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

    async def _parts(self, document_id: str) -> AsyncIterator[bytes]:
        """The parts of a document behind its description."""
        number = 1
        while content := await self.documents.document_part(document_id, number, self.visible_owner):
            yield content
            number += 1

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
        """Submit the requests of a file. Where a line is no request, none is, and the batch has failed.

        Raises `ProblemError`, also where the caller is over its limit of items, or the errors over that of files.
        """
        self._caller.take_items(0)
        await self.check_file(new.input_file_id)
        if new.endpoint == EMBEDDINGS and not EMBEDDING.models_of(self._gateway.models):
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "endpoint: there is no model for embeddings")
        batch_id = f"{BATCH}{uuid.uuid4().hex}"
        record = _Record(new=new, created_at=int(self._clock()))
        with closing(sqlite3.connect("")) as seen:  # in a temporary file, because there may be millions
            seen.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY) WITHOUT ROWID")
            async for lines in self._lines(new.input_file_id):
                for line in lines:
                    record.total += 1
                    try:
                        custom_id = _request(line, new.endpoint).custom_id
                    except ProblemError as error:
                        problem = error.detail
                    else:
                        if seen.execute("INSERT OR IGNORE INTO ids VALUES (?)", [custom_id]).rowcount:
                            continue
                        problem = f"custom_id {custom_id!r:.100} comes twice"
                    if len(record.errors) < MAX_SHOWN_ERRORS:
                        record.errors.append(BatchError(code="invalid_line", line=line.number, message=problem))
        if not record.total:
            record.errors.append(BatchError(code="empty_file", line=1, message="the file has no requests"))
        if not record.errors:
            self._caller.take_items(record.total)
            try:
                record.refused = await self._submit_all(batch_id, new)
            except BaseException:
                with anyio.CancelScope(shield=True):  # else its jobs would run without a batch
                    await self._batches.cancel(batch_id, self.visible_owner)
                    await self.documents.remove_document(batch_id)
                raise
        await self._put(batch_id, to_json(record))
        return await self.batch(batch_id)

    async def batch(self, batch_id: str) -> BatchObject:
        """A batch as it is now. Raises `ProblemError`."""
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
            failed_at = record.created_at
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
        if batch is not None and batch.active:
            changes["status"] = "in_progress" if record.cancelled_at is None else "cancelling"
            return found.model_copy(update=changes)
        removed = max(0, record.total - record.refused - sum(counts.values()))
        ended_at = record.created_at if batch is None or batch.finished_at is None else int(batch.finished_at)
        ending = batch_id.removeprefix(BATCH)
        changes["output_file_id"] = f"{OUTPUT}{ending}" if completed else None
        changes["error_file_id"] = f"{ERRORS}{ending}" if failed or counts.get(JobStatus.CANCELLED) else None
        if counts.get(JobStatus.CANCELLED):
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
        record = await self._record(batch_id)
        if (await self.batch(batch_id)).status == "in_progress":
            await self._put(batch_id, to_json(record.model_copy(update={"cancelled_at": int(self._clock())})))
            await self._batches.cancel(batch_id, self.visible_owner)
        return await self.batch(batch_id)

    async def _submit_all(self, batch_id: str, new: NewBatch) -> int:
        """Submit the requests of a file; returns how many are refused, and keeps their lines of the error file."""
        refused = parts = 0
        async for lines in self._lines(new.input_file_id):
            if errors := await self._submit(batch_id, lines, new.endpoint):
                refused, parts = refused + len(errors), parts + 1
                content = b"".join(to_json(error) + b"\n" for error in errors)
                await self.check_room(len(content))
                await self._put(batch_id, content, parts)
        return refused

    async def _submit(self, batch_id: str, lines: Sequence[Line], endpoint: str) -> list[dict[str, Any]]:
        """Submit requests as jobs; returns what the error file says of those that are refused."""
        jobs = dict[str, list[tuple[int, AsyncInputModel]]]()
        errors = dict[str, Exception]()
        names = dict[int, str]()
        for line in lines:
            asked = _request(line, endpoint)
            names[line.number] = asked.custom_id
            try:
                model, message = self._item_of(asked)
            except BaseException as error:  # noqa: BLE001  # the line's own; a user's validators may raise anything
                errors[asked.custom_id] = users_error(error)
                continue
            job = AsyncInputModel(message=message, meta={"custom_id": asked.custom_id}, expires_in=WINDOW_S)
            jobs.setdefault(model.name, []).append((line.number, job))
        for model_name, chosen in jobs.items():
            numbers = [number for number, _ in chosen]
            requests = [job for _, job in chosen]
            batch = JobBatchLines(batch_id, numbers)
            outcomes = await self._gateway.jobs.submit(
                requests, model_name=model_name, owner=self._caller.owner, batch=batch
            )
            for number, outcome in zip(numbers, outcomes, strict=True):
                if isinstance(outcome, Failure):
                    errors[names[number]] = outcome.error
        return [_refused(custom_id, as_problem(error)) for custom_id, error in errors.items()]

    def _item_of(self, asked: _Request) -> tuple[Model, BaseModel]:
        """The model of a request, and its item. Raises `ProblemError` and `UnknownModelError`."""
        item = dict(asked.body)
        name = item.pop("model", None)
        if name is not None and not isinstance(name, str):
            raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "model: must be the name of a model, a JSON string")
        models = EMBEDDING.models_of(self._gateway.models) if asked.url == EMBEDDINGS else self._gateway.models
        if asked.url == EMBEDDINGS:
            if not isinstance(item.get("input"), str):
                raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "input: must be one text; give each its own line")
            item = {"text": item["input"]}
        model = find_model(models, name)
        return model, self._parser_of(model.input_model).item(to_json(item))

    def _lines(self, file_id: str) -> AsyncIterator[list[Line]]:
        return lines_of(self.content(file_id), self._limits.max_line_bytes)

    async def _record(self, batch_id: str) -> _Record:
        return _Record.model_validate_json(await self._read(BATCH, batch_id))

    async def _read(self, beginning: str, document_id: str) -> bytes:
        if document_id.startswith(beginning):
            content = await self.documents.document_part(document_id, 0, self.visible_owner)
            if content is not None:
                return content
        raise ProblemError(HTTPStatus.NOT_FOUND, f"there is no {document_id!r:.100}: it is wrong, or was removed")

    async def _put(self, document_id: str, content: bytes, part: int = 0) -> None:
        await self.documents.put_document(document_id, part, self._caller.owner, content, self._clock())


def _request(line: Line, endpoint: str) -> _Request:
    """What a line asks for. Raises `ProblemError`."""
    if isinstance(line.content, ProblemError):
        raise line.content.with_traceback(None)  # many lines may share one error
    try:
        asked = _Request.model_validate(from_json(line.content))
    except ValidationError as error:
        raise invalid(error.errors(include_url=False), _Request) from None
    except ValueError as error:
        reason = str(error).replace(" at line 1 column", " at column")  # a line is one of many
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"is not JSON: {reason}; correct it there") from None
    check_keys(line.content, "line")
    if asked.url != endpoint:
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"url: must be that of the batch, {endpoint}")
    return asked


def _refused(custom_id: str, problem: ProblemError) -> dict[str, Any]:
    body = {"error": {"message": problem.detail, "code": str(int(problem.status))}}
    response = {"status_code": int(problem.status), "request_id": "", "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


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
