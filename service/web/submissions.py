"""``POST /async/predict``: one job, a list of them, or a stream of any length."""

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from modalkit.batching import Failure, Outcome, Success
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import AsyncInputModel
from modalkit.service.errors import describe_error
from modalkit.service.gateway import Gateway
from modalkit.service.jobs import JobStoreError
from modalkit.service.web.answers import NDJSON, json_response
from modalkit.service.web.bodies import BodyParser, InvalidItem, read_body
from modalkit.service.web.lines import LARGEST_LINE_BYTES, Line, lines_of
from modalkit.service.web.options import Options
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.spool import Spool

logger = logging.getLogger(__name__)

NDJSON_TYPES = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")

_TOO_LARGE = InvalidItem(f"the line is larger than {LARGEST_LINE_BYTES} bytes: send it as a request of its own")


class Submitter:
    """Submits the jobs of one request to one model."""

    def __init__(self, gateway: Gateway, parser: BodyParser, options: Options) -> None:
        self._gateway = gateway
        self._parser = parser
        self._options = options

    async def answer(self, request: Request) -> Response:
        """Submit what the body of the request asks for, and answer once it is stored."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type in NDJSON_TYPES:
            self._refuse_key()
            await self._submit([])  # a model that takes none is the answer to the request, and not to each line
            return SubmissionStream(request, self)
        body = await read_body(request)
        if body.lstrip()[:1] == b"[":
            self._refuse_key()
            answers = [_json(outcome) for outcome in await self._submit(self._parser.async_requests(body))]
            return json_response(b"[" + b",".join(answers) + b"]", HTTPStatus.ACCEPTED)
        job = _with_key(self._parser.async_request(body), self._options.idempotency_key)
        job_id = await self._gateway.submit(job, model_name=self._options.model_name, priority=self._options.priority)
        location = f"{request.scope.get('root_path', '')}/jobs/{job_id}"
        return json_response(to_json({"job_id": job_id}), HTTPStatus.ACCEPTED, {"Location": location})

    async def answer_lines(self, lines: Sequence[Line]) -> bytes:
        """Submit the jobs of some lines, and return the lines that say what became of them."""
        asked = [_TOO_LARGE if line.content is None else self._parser.line(line.content) for line in lines]
        try:
            outcomes = await self._submit(asked)
        except Exception as error:  # the lines after these may fare better
            if not isinstance(error, JobStoreError):
                logger.exception("Jobs of a stream could not be submitted")
            outcomes = [Failure(error)] * len(lines)
        return b"".join(
            b'{"line":%d,%s\n' % (line.number, _json(outcome)[1:])
            for line, outcome in zip(lines, outcomes, strict=True)
        )

    async def _submit(self, asked: Sequence[AsyncInputModel | InvalidItem]) -> list[Outcome[str] | InvalidItem]:
        valid = [item for item in asked if not isinstance(item, InvalidItem)]
        outcomes = iter(
            await self._gateway.submit_many(valid, model_name=self._options.model_name, priority=self._options.priority)
        )
        return [item if isinstance(item, InvalidItem) else next(outcomes) for item in asked]

    def _refuse_key(self) -> None:
        if self._options.idempotency_key is not None:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "Idempotency-Key: one key cannot stand for several jobs; give each its own idempotency_key",
            )


class SubmissionStream(Response):
    """Reads lines, each a job, and answers each with a line: its `job_id` once the job is stored, or an error.

    No faster than the jobs are stored, and with a bounded amount of memory. Answers are sent while lines still come,
    yet none waits for them to be read: many clients send everything before they read anything. A client that goes away
    leaves the jobs of the lines that were read.
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


def _with_key(job: AsyncInputModel, idempotency_key: str | None) -> AsyncInputModel:
    if idempotency_key is None:
        return job
    if job.idempotency_key not in (None, idempotency_key):
        raise ProblemError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "Idempotency-Key: the body has another idempotency_key; leave out one of the two",
        )
    return job.model_copy(update={"idempotency_key": idempotency_key})


def _json(outcome: Outcome[str] | InvalidItem) -> bytes:
    if isinstance(outcome, Success):
        return to_json({"job_id": outcome.value})
    error: Any = outcome.error
    return to_json({"status": "error", "error": error if isinstance(error, str) else describe_error(error)})
