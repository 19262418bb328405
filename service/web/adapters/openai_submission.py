"""Checks the requests of OpenAI's batches, and makes jobs of them, in the background: a file may have very many.

How many are left is kept in the record of the batch, which is stored first. So what a killed process left is gone on
with: requests of its last step that are jobs already have their idempotency keys, and are not added again.
"""

import logging
import sqlite3
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from http import HTTPStatus
from itertools import count
from typing import Any, Literal

import anyio
from pydantic import BaseModel
from pydantic_core import to_json

from modalkit.batching import Failure
from modalkit.batching.errors import users_error
from modalkit.pipelines import AsyncInputModel
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import NotReadyError, Readiness
from modalkit.service.gateway import Gateway, Model, find_model
from modalkit.service.jobs import JobBatchLines, JobStoreError
from modalkit.service.jobs.errors import JobStoreFullError
from modalkit.service.jobs.manager import JobManager
from modalkit.service.jobs.store import JobStore
from modalkit.service.settings import RequestConfig
from modalkit.service.web.adapters.openai_shapes import BatchError, BatchObject, NewBatch
from modalkit.service.web.adapters.tasks import EMBEDDING
from modalkit.service.web.admission import Admission
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser, parsed_as
from modalkit.service.web.lines import Line, Lines, lines_of
from modalkit.service.web.problems import ProblemError, as_problem

logger = logging.getLogger(__name__)

WINDOW_S = 86_400
MAX_SHOWN_ERRORS = 100
PREDICT, EMBEDDINGS = "/sync/predict", "/v1/embeddings"
BATCH = "batch_"
"""The beginning of the ids of batches."""
BATCHES_AT_ONCE = 8
"""Batches whose files are read at the same time; the others wait."""
LONGEST_PAUSE_S = 30.0
"""Maximum seconds until a submission is tried again that a model, or the store, was not ready for."""


class BatchRecord(BaseModel):
    """What is stored of a batch, besides its jobs."""

    new: NewBatch
    created_at: int
    owner: str = ""
    """The owner of its jobs."""
    total: int = 0
    left: int | None = 0
    """Requests, the last ones of the file, that have not been submitted; None before they are checked."""
    errors: list[BatchError] = []
    failed_at: int | None = None
    refused: int = 0
    """Requests that became no job; their lines of the error file are the other parts of the document."""
    refused_parts: int = 0
    cancelled_at: int | None = None
    ended: BatchObject | None = None
    """The batch as it was when all its requests had ended; their jobs are removed before it."""

    @property
    def is_stopped(self) -> bool:
        """Whether what is left is not to be submitted."""
        return bool(self.errors) or self.cancelled_at is not None


class BatchRequest(BaseModel):
    """A line of an input file."""

    custom_id: str
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


class _Submission:
    """A submission that runs: the scope to cancel it by, and when it has ended."""

    def __init__(self, file_id: str = "") -> None:
        self.file_id = file_id
        self.scope, self.ended = anyio.CancelScope(), anyio.Event()


class Submissions:
    """Submits the requests of batches, each batch in a task of the job manager."""

    def __init__(
        self, gateway: Gateway, admission: Admission, parser_of: Callable[[type[BaseModel]], BodyParser]
    ) -> None:
        self._gateway, self._parser_of = gateway, parser_of
        self._limits, self._turn = admission.limits, admission.turn
        self._places = anyio.Semaphore(BATCHES_AT_ONCE)
        self._running: dict[str, _Submission] = {}

    @asynccontextmanager
    async def resumed(self, _: object) -> AsyncGenerator[None]:
        """The lifespan of an application: go on with what an earlier process left, if the gateway is open."""
        manager = self._gateway.jobs.administration
        if manager is not None and manager.is_open:
            manager.start_soon(self._resume, manager)
        yield

    async def _resume(self, manager: JobManager) -> None:
        try:
            for batch_id in await manager.documents.document_ids(BATCH, None):
                record = await record_of(manager.documents, batch_id)
                if record is not None and record.left != 0:
                    self.start(manager, batch_id, record)
        except Exception:
            logger.exception("Batches could not be read: one that is not submitted whole goes on once it is asked for")

    def start(self, manager: JobManager, batch_id: str, record: BatchRecord, caller: Caller | None = None) -> None:
        """Check the requests of a batch and submit what is left, unless that goes on already; returns at once.

        With the `caller`, they count against its limit of items.
        """
        if batch_id not in self._running:
            submission = self._running[batch_id] = _Submission(record.new.input_file_id)
            manager.start_soon(self._submit, manager, batch_id, submission, caller)

    def batch_of_file(self, file_id: str) -> str | None:
        """A batch whose requests are being read from this file, if there is one."""
        running = (batch_id for batch_id, each in self._running.items() if each.file_id == file_id)
        return next(running, None)

    @asynccontextmanager
    async def stopped(self, batch_id: str) -> AsyncGenerator[None]:
        """A context in which no request of a batch is submitted, and its record is not changed by this."""
        while (running := self._running.get(batch_id)) is not None:
            running.scope.cancel()
            await running.ended.wait()
        placeholder = self._running[batch_id] = _Submission()
        try:
            yield
        finally:
            del self._running[batch_id]
            placeholder.ended.set()

    async def _submit(self, manager: JobManager, batch_id: str, submission: _Submission, caller: Caller | None) -> None:
        try:
            with submission.scope:
                for attempt in count(1):
                    try:
                        async with self._places:
                            await self._go_on(manager, batch_id, caller)
                    except (NotReadyError, JobStoreError, ProblemError) as error:
                        logger.warning("Batch %s is not submitted whole yet; trying again: %s", batch_id, error)
                    except Exception:  # a record that cannot be read, for example
                        logger.exception("Batch %s cannot be submitted", batch_id)
                        return
                    else:
                        return
                    await anyio.sleep(backoff_with_jitter(attempt, first_s=1.0, longest_s=LONGEST_PAUSE_S))
        finally:
            self._running.pop(batch_id, None)
            submission.ended.set()

    async def _go_on(self, manager: JobManager, batch_id: str, caller: Caller | None) -> None:
        """Check the requests and submit what is left; where that cannot be done, the batch fails.

        Raises `NotReadyError`, `JobStoreError` and `ProblemError` where it may be done later.
        """
        record = await record_of(manager.documents, batch_id)
        if record is None:
            return
        if not record.is_stopped:
            try:
                if record.left is None:
                    await self._check(manager, record, caller)
                    if not record.errors:
                        await self._put(manager, batch_id, record)
                if not record.errors:
                    await self._submit_left(manager, batch_id, record)
            except Exception as error:
                if _may_be_done_later(error):
                    raise
                logger.error("Batch %s has failed: %s", batch_id, error, exc_info=not isinstance(error, ProblemError))  # noqa: TRY400  # what a ProblemError says is all
                record.errors.append(BatchError(code="not_submitted", message=as_problem(error).detail))
            if not record.errors:
                return
            record.failed_at = int(manager.clock())
            await self._put(manager, batch_id, record)
        # Also after the death of a process that had stored that the batch has failed, or is cancelled.
        await manager.batches.cancel(batch_id, record.owner)

    async def _check(self, manager: JobManager, record: BatchRecord, caller: Caller | None) -> None:
        """Count the requests, and find what is wrong with their lines. Raises `ProblemError` for a caller's limit."""
        if caller is not None:
            caller.take_items(0)  # before the file is read
        with closing(sqlite3.connect("")) as seen:  # in a temporary file, because there may be millions
            seen.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY) WITHOUT ROWID")
            async for lines in self._lines_of(manager, record):
                async with self._turn:
                    _check_lines(record, lines, seen)
        if not record.total:
            record.errors.append(BatchError(code="empty_file", line=1, message="the file has no requests"))
        elif not record.errors and caller is not None:
            caller.take_items(record.total)
        record.left = record.total

    async def _submit_left(self, manager: JobManager, batch_id: str, record: BatchRecord) -> None:
        submitted = record.total - (record.left or 0)
        async for lines in self._lines_of(manager, record):
            some, submitted = lines[submitted:], max(0, submitted - len(lines))
            if some:
                await self._submit_some(manager, batch_id, record, some)

    async def _submit_some(
        self, manager: JobManager, batch_id: str, record: BatchRecord, lines: Sequence[Line]
    ) -> None:
        """Submit requests as jobs, keep what the error file says of those that are refused, and store the record.

        When cancelled, they may be jobs although the record does not say so; what the store is told later comes later.
        """
        expires_in_s = record.created_at + WINDOW_S - manager.clock()
        if expires_in_s <= 0:
            raise ProblemError(HTTPStatus.CONFLICT, "the requests could not be submitted in the completion_window")
        async with self._turn:
            jobs, errors = self._jobs_of(lines, record.new.endpoint, expires_in_s)
        for model_name, chosen in jobs.items():
            numbers, requests = zip(*chosen, strict=True)
            batch = JobBatchLines(batch_id, numbers)
            outcomes = await self._gateway.jobs.submit(requests, model_name=model_name, owner=record.owner, batch=batch)
            for request, outcome in zip(requests, outcomes, strict=True):
                if isinstance(outcome, Failure):
                    errors[request.meta["custom_id"]] = outcome.error
        if errors:
            refused = [_refused(custom_id, as_problem(error)) for custom_id, error in errors.items()]
            content = b"".join(to_json(each) + b"\n" for each in refused)
            await check_room(manager.documents, self._limits, len(content))
            part = record.refused_parts + 1
            await manager.documents.put_document(batch_id, part, record.owner, content, manager.clock())
            record.refused, record.refused_parts = record.refused + len(errors), part
        record.left = (record.left or 0) - len(lines)
        await self._put(manager, batch_id, record)

    def _lines_of(self, manager: JobManager, record: BatchRecord) -> Lines:
        content = _content_of(manager.documents, record.new.input_file_id)
        return lines_of(content, self._limits.max_line_bytes)

    async def _put(self, manager: JobManager, batch_id: str, record: BatchRecord) -> None:
        await manager.documents.put_document(batch_id, 0, record.owner, to_json(record), manager.clock())

    def _jobs_of(
        self, lines: Sequence[Line], endpoint: str, expires_in_s: float
    ) -> tuple[dict[str, list[tuple[int, AsyncInputModel]]], dict[str, Exception]]:
        """The jobs of requests, each with its line, by the name of its model; and errors, by `custom_id`."""
        jobs = dict[str, list[tuple[int, AsyncInputModel]]]()
        errors = dict[str, Exception]()
        for line in lines:
            asked = read_request(line, endpoint)
            try:
                model, message = self._item_of(asked)
            except BaseException as error:  # noqa: BLE001  # the line's own; a user's validators may raise anything
                errors[asked.custom_id] = users_error(error)
                continue
            job = AsyncInputModel(message=message, meta={"custom_id": asked.custom_id}, expires_in=expires_in_s)
            jobs.setdefault(model.name, []).append((line.number, job))
        return jobs, errors

    def _item_of(self, asked: BatchRequest) -> tuple[Model, BaseModel]:
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


def _check_lines(record: BatchRecord, lines: Sequence[Line], seen: sqlite3.Connection) -> None:
    """Count lines, and note the errors of the first wrong ones; `seen` has the `custom_id`s of those before."""
    for line in lines:
        record.total += 1
        try:
            custom_id = read_request(line, record.new.endpoint).custom_id
        except ProblemError as error:
            problem = error.detail
        else:
            if seen.execute("INSERT OR IGNORE INTO ids VALUES (?)", [custom_id]).rowcount:
                continue
            problem = f"custom_id {custom_id!r:.100} comes twice"
        if len(record.errors) < MAX_SHOWN_ERRORS:
            record.errors.append(BatchError(code="invalid_line", line=line.number, message=problem))


def read_request(line: Line, endpoint: str) -> BatchRequest:
    """What a line asks for. Raises `ProblemError`."""
    if isinstance(line.content, ProblemError):
        raise line.content.with_traceback(None)  # many lines may share one error
    asked = parsed_as(BatchRequest, line.content, "line")
    if asked.url != endpoint:
        raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"url: must be that of the batch, {endpoint}")
    return asked


async def record_of(documents: JobStore, batch_id: str) -> BatchRecord | None:
    """What is stored of a batch; None where it was removed."""
    content = await documents.document_part(batch_id, 0, None)
    return None if content is None else BatchRecord.model_validate_json(content)


async def parts_of(documents: JobStore, document_id: str, owner: str | None) -> AsyncIterator[bytes]:
    """The parts of a document of an owner, or of any, behind its description."""
    number = 1
    while content := await documents.document_part(document_id, number, owner):
        yield content
        number += 1


async def _content_of(documents: JobStore, file_id: str) -> AsyncIterator[bytes]:
    """The parts of an uploaded file. Raises `ProblemError` in place of its end where it was removed meanwhile."""
    async for part in parts_of(documents, file_id, None):
        yield part
    if await documents.document_part(file_id, 0, None) is None:  # the first part to be removed
        raise ProblemError(HTTPStatus.NOT_FOUND, f"{file_id} was removed before all its requests were submitted")


async def check_room(documents: JobStore, limits: RequestConfig, more_bytes: int) -> None:
    """Raise `ProblemError` where the files would be larger in all than they may, with so many more bytes."""
    if more_bytes + await documents.documents_bytes() > limits.max_stored_file_bytes:
        detail = f"the stored files would exceed {limits.max_stored_file_bytes} bytes in all"
        remedy = "remove files that are not needed, or raise request_config.max_stored_file_bytes"
        raise ProblemError(HTTPStatus.INSUFFICIENT_STORAGE, f"{detail}: {remedy}")


def _may_be_done_later(error: Exception) -> bool:
    """Whether a submission that raised this is tried again; else its batch fails."""
    if isinstance(error, ProblemError):
        return error.status is HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, NotReadyError):
        return error.readiness is not Readiness.FAILED  # one that is broken runs after the next start
    return isinstance(error, JobStoreError) and not isinstance(error, JobStoreFullError)


def _refused(custom_id: str, problem: ProblemError) -> dict[str, Any]:
    body = {"error": {"message": problem.detail, "code": str(int(problem.status))}}
    response = {"status_code": int(problem.status), "request_id": "", "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
