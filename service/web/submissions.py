"""``POST /async/predict``: one job, a list of them, or a stream of any length."""

import logging
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

import anyio
from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from modalkit.batching import Failure, Outcome
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import AsyncInputModel
from modalkit.service.gateway import Jobs
from modalkit.service.jobs import JobStoreError
from modalkit.service.web.admission import Admission, read_body
from modalkit.service.web.answers import JSON, NDJSON
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser, run_valid
from modalkit.service.web.options import RESPOND_ASYNC, SubmissionOptions
from modalkit.service.web.problems import ProblemError, error_json

logger = logging.getLogger(__name__)

NDJSON_TYPES = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")

MAX_LINE_BYTES = 2**20
SPOOL_MEMORY_BYTES = 2**20
SPOOL_CHUNK_BYTES = 2**16

_TOO_LARGE = ProblemError(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    f"the line is larger than {MAX_LINE_BYTES} bytes: send it as a request of its own",
)


class Line(NamedTuple):
    """A line that is not empty. `number` counts all lines from 1; `content` is None where it is too large."""

    number: int
    content: bytes | None


class Submitter:
    """Submits the jobs of one request to one model."""

    def __init__(
        self,
        jobs: Jobs,
        model_name: str,
        parser: BodyParser,
        options: SubmissionOptions,
        caller: Caller,
        admission: Admission,
    ) -> None:
        self._jobs = jobs
        self._model_name = model_name
        self._parser = parser
        self._options = options
        self._caller = caller
        self._admission = admission

    async def answer(self, request: Request) -> Response:
        """Submit what the body of the request asks for, and answer once it is stored."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type in NDJSON_TYPES:
            self._refuse_key()
        await self._submit([])  # a model that takes no jobs now fails the request before it is read, not each line
        if media_type in NDJSON_TYPES:
            return SubmissionStream(request, self)
        body = await read_body(request)
        if body.lstrip()[:1] == b"[":
            self._refuse_key()
            jobs = await self._parser.jobs(body)
            self._caller.take_items(len(jobs))
            answers = await self._admission.map(_json, await self._submit(jobs))
            return Response(b"[" + b",".join(answers) + b"]", HTTPStatus.ACCEPTED, media_type=JSON)
        return await self._answer_one(request, self._parser.job(body))

    async def answer_later(self, request: Request) -> Response:
        """Submit the item in the body of a request that prefers a job to waiting."""
        await self._submit([])  # as above
        job = AsyncInputModel(message=self._parser.item(await read_body(request)))
        response = await self._answer_one(request, job)
        response.headers["Preference-Applied"] = RESPOND_ASYNC
        return response

    async def _answer_one(self, request: Request, job: AsyncInputModel) -> Response:
        keyed = self._with_key(job)
        self._caller.take_items(1)
        (outcome,) = await self._submit([keyed])
        if isinstance(outcome, Failure):
            raise outcome.error
        location = f"{request.scope.get('root_path', '')}/jobs/{outcome.value}"
        return Response(_json(outcome), HTTPStatus.ACCEPTED, {"Location": location}, JSON)

    async def answer_lines(self, lines: Sequence[Line]) -> bytes:
        """Submit the jobs of some lines; returns a line for each, with its `job_id` or its error."""
        await self._caller.wait_for_items(len(lines))
        asked = [Failure(_TOO_LARGE) if line.content is None else self._parser.line(line.content) for line in lines]
        try:
            outcomes = await self._submit(asked)
        except Exception as error:  # the lines after these may succeed
            if not isinstance(error, JobStoreError):
                logger.exception("Jobs of a stream could not be submitted")
            outcomes = [Failure(error)] * len(lines)
        return b"".join(
            b'{"line":%d,%s\n' % (line.number, _json(outcome)[1:])
            for line, outcome in zip(lines, outcomes, strict=True)
        )

    async def _submit(self, asked: Sequence[AsyncInputModel | Failure]) -> list[Outcome[str]]:
        return await run_valid(
            asked,
            partial(
                self._jobs.submit,
                model_name=self._model_name,
                priority=self._options.priority,
                owner=self._caller.owner,
            ),
        )

    def _with_key(self, job: AsyncInputModel) -> AsyncInputModel:
        key = self._options.idempotency_key
        if key is None:
            return job
        if job.idempotency_key not in (None, key):
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "Idempotency-Key: the body has another idempotency_key; leave out one of the two",
            )
        return job.model_copy(update={"idempotency_key": key})

    def _refuse_key(self) -> None:
        if self._options.idempotency_key is not None:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "Idempotency-Key: one key cannot stand for several jobs; give each its own idempotency_key",
            )


async def lines_of(chunks: AsyncIterable[bytes], max_bytes: int = MAX_LINE_BYTES) -> AsyncIterator[list[Line]]:
    """The lines of a body, in lists of those that arrived together.

    The content of a line that is too large is dropped, so that memory is bounded.
    """

    def join(line: bytes | None, part: bytes) -> bytes | None:
        return None if line is None or len(line) + len(part) > max_bytes else line + part

    number = 0
    rest: bytes | None = b""
    async for chunk in chunks:
        first, *others = chunk.split(b"\n")
        lines = []
        rest = join(rest, first)
        for part in others:
            number += 1
            lines.append(Line(number, rest))
            rest = join(b"", part)
        if wanted := [line for line in lines if line.content is None or line.content.strip()]:
            yield wanted
    if rest is None or rest.strip():
        yield [Line(number + 1, rest)]


class Spool(AbstractContextManager["Spool"]):
    """A pipe whose writer never waits: beyond a megabyte, bytes that have not been read are in a temporary file.

    It has one reader, which waits for bytes.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115  # closed by __exit__
        self._read_bytes = 0
        self._written_bytes = 0
        self._closed = False
        self._change = anyio.Event()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._file.seek(self._written_bytes)
        self._written_bytes += self._file.write(data)
        self._change.set()

    def close(self) -> None:
        """Mark the end: the reader gets it once it has read everything."""
        self._closed = True
        self._change.set()

    async def read(self) -> bytes:
        """Wait for bytes and return up to `SPOOL_CHUNK_BYTES` of them; empty at the end."""
        while self._read_bytes == self._written_bytes and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        self._file.seek(self._read_bytes)
        data = self._file.read(SPOOL_CHUNK_BYTES)
        self._read_bytes += len(data)
        if self._read_bytes == self._written_bytes:
            self._read_bytes = self._written_bytes = 0
            self._file.seek(0)
            self._file.truncate()
        return data


class SubmissionStream(Response):
    """Reads lines, each a job, and answers each with a line: its `job_id` once the job is stored, or an error.

    Lines are read no faster than jobs are stored, in a bounded amount of memory. Answers are sent while lines are read,
    and reading does not wait for the client to read answers: many clients send everything before they read anything.
    When a client disconnects, the jobs of the lines that were read stay.
    """

    def __init__(self, request: Request, submitter: Submitter) -> None:
        super().__init__(media_type=NDJSON)
        del self.headers["content-length"]
        self._request = request
        self._submitter = submitter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        """Answer, as an ASGI application does."""
        with Spool() as spool:
            async with plain_task_group() as task_group:
                task_group.start_soon(self._send, spool, send)
                try:
                    async for lines in lines_of(self._request.stream()):
                        spool.write(await self._submitter.answer_lines(lines))
                except ClientDisconnect:
                    task_group.cancel_scope.cancel()
                spool.close()

    async def _send(self, spool: Spool, send: Send) -> None:
        answer = await spool.read()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while answer:
            await send({"type": "http.response.body", "body": answer, "more_body": True})
            answer = await spool.read()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(outcome: Outcome[str]) -> bytes:
    return error_json(outcome.error) if isinstance(outcome, Failure) else to_json({"job_id": outcome.value})
