"""Server-sent events: the response class, and the events of predictions and jobs."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

import anyio
from fastapi.responses import Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from modalkit.batching import RequestOptions, Success
from modalkit.batching.task_groups import plain_task_group
from modalkit.service.errors import OutputNotJsonError
from modalkit.service.gateway import Jobs, Model
from modalkit.service.jobs import Job, JobPiece, JobStatus
from modalkit.service.outputs import output_json
from modalkit.service.web.admission import Reception, reception_of
from modalkit.service.web.answers import EVENT_STREAM, job_json
from modalkit.service.web.problems import KNOWN_ERRORS, as_problem, error_response, problem_json

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy closes the connection."""

_LETTERS = {status: status.value[0] for status in JobStatus}
_ENDED = {letter for status, letter in _LETTERS.items() if status.has_ended}


class EventStream(Response):
    """Answers with events as they are made, with a comment in each pause, and ends with them.

    No more events are made than the client reads, and none once it has disconnected. An error before the first one is
    answered as that of any other request; a later one is an event ``error`` with the problem details.
    """

    media_type = EVENT_STREAM

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does."""
        reception = reception_of(scope)
        made, events = anyio.create_memory_object_stream[bytes | Exception]()
        async with plain_task_group() as task_group, events:

            async def make_events() -> None:
                async with made, aclosing(self._events):
                    try:
                        async for event in self._events:
                            with reception.answer(len(event)):
                                await made.send(event)
                    except KNOWN_ERRORS as error:
                        await made.send(error)

            async def watch_connection() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                task_group.cancel_scope.cancel()

            task_group.start_soon(make_events)
            task_group.start_soon(watch_connection)
            has_started = False
            while True:
                event: bytes | Exception = KEEPALIVE_COMMENT
                try:
                    with anyio.move_on_after(HEARTBEAT_S):
                        event = await events.receive()
                except anyio.EndOfStream:
                    break
                if isinstance(event, Exception):
                    if not has_started:
                        await error_response(event)(scope, receive, send)
                        task_group.cancel_scope.cancel()
                        return
                    event = sse_event("error", problem_json(event))
                if not has_started:
                    has_started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                with reception.answer(len(event), may_be_refused=False):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            task_group.cancel_scope.cancel()


async def prediction_events(model: Model, item: BaseModel, options: RequestOptions) -> AsyncGenerator[bytes]:
    """An event ``piece`` for each piece of the result of one item, and then one ``result``. Raises `ProblemError`."""
    try:
        async with aclosing(model.predict_pieces(item, **options)) as outputs:
            async for output in outputs:
                if isinstance(output, Success):
                    yield sse_event("result", output_json(output.value))
                else:
                    yield sse_event("piece", output_json(output))
    except Exception as error:
        raise as_problem(error) from error  # whatever the pipeline raised is this item's error


class JobEvents:
    """The events of some jobs, for a client that may have seen some: `last_event_id` is the id of the last one.

    The id of an event has a letter for each job, in their order: the first of the last status that was sent, or ``-``.
    """

    def __init__(self, jobs: Jobs, job_ids: Sequence[str], last_event_id: str | None, reception: Reception) -> None:
        self._jobs = jobs
        self._reception = reception
        self._places = {job_id: place for place, job_id in enumerate(job_ids)}
        is_ours = last_event_id is not None and len(last_event_id) == len(self._places)
        self._seen = list(last_event_id or "") if is_ours else ["-"] * len(self._places)

    @property
    def are_all_seen(self) -> bool:
        """Whether the client has seen how each job ended."""
        return _ENDED.issuperset(self._seen)

    async def make(self) -> AsyncGenerator[bytes]:
        """For each job ``status`` when it changes, ``piece`` and, at its end, ``result``. Raises `JobStoreError`."""
        yield KEEPALIVE_COMMENT  # starts the answer
        left = [job_id for job_id, place in self._places.items() if self._seen[place] not in _ENDED]
        async with aclosing(self._jobs.watch(left)) as changes:
            async for change in changes:
                if isinstance(change, JobPiece):
                    try:
                        piece = output_json(change.output)
                    except OutputNotJsonError as error:  # the job goes on, and its result may be written
                        logger.debug("A piece of job %s is left out: %s", change.job_id, error)
                        continue
                    yield sse_event("piece", b'{"job_id":%s,"piece":%s}' % (to_json(change.job_id), piece))
                    continue
                place, letter = self._places[change.job_id], _LETTERS[change.status]
                if self._seen[place] == letter:
                    continue
                self._seen[place] = letter
                name = "result" if change.status.has_ended else "status"
                make = partial(_job_event, name, change, "".join(self._seen))
                yield await self._reception.write(change.size_bytes, make)


def _job_event(name: str, job: Job, event_id: str) -> bytes:
    return sse_event(name, job_json(job), event_id)


def sse_event(name: str, content: bytes, event_id: str | None = None) -> bytes:
    """An event with JSON as its data."""
    return format_sse_event(event=name, data_str=content.decode(), id=event_id)
