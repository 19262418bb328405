"""``POST /async/predict``: one job, a list of them, or a stream of any length."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from urllib.parse import quote

from anyio.lowlevel import checkpoint
from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from modalkit.batching import Failure, Outcome
from modalkit.pipelines import AsyncInputModel
from modalkit.service.gateway import Jobs
from modalkit.service.jobs import JobBatchLines, JobStoreError
from modalkit.service.validation import run_valid
from modalkit.service.web.admission import FREE_BYTES, Admission, read_body
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.direct import DirectResponse
from modalkit.service.web.line_models import FindTarget, Target, parse_lines
from modalkit.service.web.lines import Line, Lines, LineStream
from modalkit.service.web.options import RESPOND_ASYNC, SubmissionOptions, takes_lines
from modalkit.service.web.problems import ProblemError, error_slot, slot_json

logger = logging.getLogger(__name__)


class Submitter:
    """Submits the jobs of one request to one model, except lines that name another."""

    def __init__(
        self,
        jobs: Jobs,
        find: FindTarget,
        options: SubmissionOptions,
        caller: Caller,
        admission: Admission,
    ) -> None:
        self._jobs = jobs
        self._find = find
        self._target = find(options.model_name)
        self._parser = self._target.parser
        self._options = options
        self._caller = caller
        self._admission = admission

    async def answer(self, request: Request) -> Response:
        """Submit what the body of the request asks for, and answer once it is stored."""
        is_stream = takes_lines(request)
        if is_stream:
            self._refuse_key()
        # A model that takes no jobs now fails the request before it is read, not each line.
        self._jobs.check_accepting(self._target.model.name)
        if is_stream:
            return LineStream(self._answer_lines, self._admission)
        self._caller.take_items(0)  # a caller that is over its limit is refused before its body is read
        body = await read_body(request)
        if body.lstrip()[:1] == b"[":
            self._refuse_key()
            jobs = await self._parser.jobs(body)
            self._caller.take_items(len(jobs))
            answers = await self._admission.map(partial(map, _answer), await self._submit(jobs))
            return DirectResponse(to_json(answers), HTTPStatus.ACCEPTED, may_be_refused=False)
        job = self._parser.job(body)
        if len(body) > FREE_BYTES:
            await checkpoint()  # others have their turn before it is written
        return await self._answer_one(request, job)

    async def answer_later(self, request: Request) -> Response:
        """Submit the item in the body of a request that prefers a job to waiting."""
        self._jobs.check_accepting(self._target.model.name)  # as above
        self._caller.take_items(0)
        job = AsyncInputModel(message=self._parser.item(await read_body(request)))
        response = await self._answer_one(request, job)
        response.headers["Preference-Applied"] = RESPOND_ASYNC
        return response

    async def _answer_one(self, request: Request, job: AsyncInputModel) -> Response:
        keyed = self._with_key(job)
        self._caller.take_items(1)
        (outcome,) = await self._submit_valid([keyed], self._batch_of([keyed], [1]))
        if isinstance(outcome, Failure):
            raise outcome.error
        location = quote(f"{request.scope.get('root_path', '')}/jobs/{outcome.value}")
        return DirectResponse(to_json(_answer(outcome)), HTTPStatus.ACCEPTED, [(b"location", location.encode())])

    async def _answer_lines(self, lines: Lines, write: Callable[[bytes], None]) -> None:
        """Submit the jobs of all lines, and answer each with its `job_id` or its error once the job is stored.

        Lines are taken no faster than jobs are stored. When cancelled, the jobs of lines that were taken may be stored.
        """
        async for some in lines:
            write(await self._answer_some(some))

    async def _answer_some(self, lines: Sequence[Line]) -> bytes:
        await self._caller.wait_for_items(len(lines))
        asked, targets = await parse_lines(lines, BodyParser.job_lines, self._target, self._find)
        answers = dict[int, bytes]()
        for target in dict.fromkeys(targets):
            chosen = [
                (line.number, entry)
                for line, entry, its_target in zip(lines, asked, targets, strict=True)
                if its_target is target
            ]
            numbers, entries = zip(*chosen, strict=True)
            try:
                outcomes = await self._submit(entries, numbers, target)
            except Exception as error:  # the lines after these may succeed
                if not isinstance(error, JobStoreError):
                    logger.exception("Jobs of a stream could not be submitted")
                outcomes = [Failure(error)] * len(entries)
            answers |= {number: _line(number, outcome) for number, outcome in zip(numbers, outcomes, strict=True)}
        return b"".join(answers[line.number] for line in lines)

    async def _submit(
        self,
        asked: Sequence[AsyncInputModel | Failure],
        numbers: Iterable[int] | None = None,
        target: Target | None = None,
    ) -> list[Outcome[str]]:
        """Submit jobs, which have these `numbers` (from 1) in the request; returns the outcome of each."""
        batch = self._batch_of(asked, numbers or range(1, len(asked) + 1))
        return await run_valid(asked, partial(self._submit_valid, batch=batch, target=target))

    def _submit_valid(
        self, jobs: Sequence[AsyncInputModel], batch: JobBatchLines | None, target: Target | None = None
    ) -> Awaitable[list[Outcome[str]]]:
        return self._jobs.submit(
            jobs,
            model_name=(target or self._target).model.name,
            priority=self._options.priority,
            owner=self._caller.owner,
            batch=batch,
        )

    def _batch_of(self, asked: Sequence[AsyncInputModel | Failure], numbers: Iterable[int]) -> JobBatchLines | None:
        """The lines of the jobs that are valid, where the request has a batch."""
        if self._options.batch_id is None:
            return None
        first = self._options.first_line - 1
        lines = [first + number for job, number in zip(asked, numbers, strict=True) if not isinstance(job, Failure)]
        return JobBatchLines(self._options.batch_id, lines)

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


def _line(number: int, outcome: Outcome[str]) -> bytes:
    if isinstance(outcome, Failure):
        return b'{"line":%d,%s\n' % (number, slot_json(outcome.error)[1:])
    return b'{"line":%d,"job_id":%s}\n' % (number, to_json(outcome.value))


def _answer(outcome: Outcome[str]) -> dict[str, str]:
    return error_slot(outcome.error) if isinstance(outcome, Failure) else {"job_id": outcome.value}
