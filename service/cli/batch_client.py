"""Submits lines as a batch of jobs to a running service, and reads results, through cut connections and restarts."""

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice, pairwise
from typing import Any, TypeVar

import anyio
import httpx
from anyio import to_thread
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import AsyncInputModel
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.cli.common import SHOWN_ERRORS, notices
from modalkit.service.cli.jobs_client import AWAY, AwayError, JobsClient, JobsError
from modalkit.service.cli.records import Record, kept_columns
from modalkit.service.cli.results import ResultWriter
from modalkit.service.errors import ServiceError
from modalkit.service.web.answers import NDJSON, BatchView

T = TypeVar("T")
R = TypeVar("R")

LINES_PER_REQUEST = 1000
BYTES_PER_REQUEST = 4 * 2**20
MAX_LINES_AHEAD = 20_000
"""Lines whose results are not written yet, beyond which no more are read."""
MAX_BYTES_AHEAD = 64 * 2**20
LONGEST_WAIT_S = 5.0
"""Maximum seconds until a service that does not answer is asked again."""
COUNTING_INTERVAL_S = 2.0
"""Seconds between two questions how many jobs have ended."""
COUNTING_PAUSE_FACTOR = 20
"""The pause after an answer is so many times as long as that took: to count a million jobs takes the store a second."""
TRANSIENT = AWAY | {HTTPStatus.TOO_MANY_REQUESTS}

_LINE = TypeAdapter(dict[str, Any])
_JOB_KEYS = AsyncInputModel.model_fields.keys() | {"model_name"}


@dataclass(slots=True)
class _Line:
    """A line whose result is not written yet."""

    record: Record
    content: bytes
    """The job, as it is sent; empty where it cannot be."""
    error: str | None = None
    is_stored: bool = False

    @property
    def number(self) -> int:
        """Its line in the batch of jobs: that of the file."""
        return self.record.line


class _TryAgainError(Exception):
    """Raised where the same request may succeed later, after `wait_s` seconds if that is known."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(slots=True)
class BatchRun:
    """One run over the lines of a batch of jobs.

    Lines are sent in parts, each again until the service has answered: it knows them by the batch and their numbers in
    the file. With a `writer`, results are read in the order of lines beside that, and written. `MAX_LINES_AHEAD` lines
    are under way at most, so memory is bounded. Raises `JobsError` where the service refuses, and `AwayError` where it
    cannot be reached for `patience_s` seconds.
    """

    client: JobsClient
    http: httpx.AsyncClient
    batch_id: str
    fields: Sequence[str]
    """The fields of the model's items."""
    job: Mapping[str, Any]
    """What each job has besides its message."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    writer: ResultWriter | None
    kept_beside: Sequence[str] | None
    """The fields of results, where the columns of the input are kept."""
    patience_s: float
    done: int = 0
    """Lines that have their result from a run before."""
    on_progress: Callable[..., object] | None = None
    """Called with `completed`: how many lines of the file are sent or, with a `writer`, how many jobs have ended."""
    failed: int = 0
    sent: int = 0
    written: int = 0
    _ended: int = 0
    _away_at: float | None = None
    _lines: deque[_Line] = field(default_factory=deque)
    _bytes: int = 0
    _all_sent: bool = False
    _change: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, records: Iterator[Record], after: int = 0) -> None:
        """Submit records, which follow line `after` of the file, and write their results."""
        failure: Exception | None = None

        async def until_failure(task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
            nonlocal failure
            try:
                await task(*arguments)
            except (ServiceError, OSError) as error:  # alone, and in no group, it is one message
                failure = failure or error
                task_group.cancel_scope.cancel()

        async with plain_task_group() as task_group:
            task_group.start_soon(until_failure, self._send_all, records)
            if self.writer is not None:
                if self.on_progress is not None:
                    task_group.start_soon(self._count_ended)
                await until_failure(self._write_all, after)
                task_group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    # Sending.

    async def _send_all(self, records: Iterator[Record]) -> None:
        while True:
            while len(self._lines) >= MAX_LINES_AHEAD or self._bytes >= MAX_BYTES_AHEAD:
                await self._next_change()
            part = await to_thread.run_sync(self._next_part, records, abandon_on_cancel=True)
            if not part:
                break
            if self.writer is not None:
                self._lines += part
                self._bytes += sum(len(line.content) for line in part)
            await self._persist("lines could not be sent", self._send, part)
            self.sent += len(part)
            if self.writer is None:
                for line in part:
                    self._count(line.record, line.error)
            self._tell_change()
        self._all_sent = True
        self._tell_change()

    def _next_part(self, records: Iterator[Record]) -> list[_Line]:
        part, size_bytes = list[_Line](), 0
        for record in islice(records, LINES_PER_REQUEST):
            line = _Line(record, b"", record.error)
            if record.error is None:
                try:
                    line.content = self._job_of(record)
                except PydanticSerializationError as error:
                    line.error = f"cannot be sent as JSON: {error}"
            part.append(line)
            size_bytes += len(line.content)
            if size_bytes >= BYTES_PER_REQUEST:
                break
        return part

    def _job_of(self, record: Record) -> bytes:
        item = record.item
        is_job = isinstance(item, dict) and "message" in item and item.keys() <= _JOB_KEYS
        if is_job and "message" not in self.fields:
            return to_json({**self.job, **item})
        return to_json({**self.job, "message": item})

    async def _send(self, part: Sequence[_Line]) -> None:
        """Send lines, and note the answer for each. Raises `_TryAgainError`."""
        first = part[0].number
        unanswered = {line.number - first + 1: line for line in part if line.error is None}
        if not unanswered:
            return
        reason, wait_s = "the answer was cut", None
        body = bytearray()
        for before, line in pairwise([part[0], *part]):
            # Lines of the file without an item, or with one that is refused, are empty ones: those are only counted.
            body += b"\n" * (line.number - before.number) + (b"" if line.error is not None else line.content)
        query = {**self.query, "batch_id": self.batch_id, "first_line": str(first)}
        headers = {**self.headers, "content-type": NDJSON}
        sending = self.http.stream("POST", "/async/predict", params=query, headers=headers, content=bytes(body))
        with self._begun():
            async with sending as response:
                async for answer in self._lines_of(response):
                    line = unanswered[answer["line"]]
                    if answer.get("status") == "error" and answer.get("problem", {}).get("status") in TRANSIENT:
                        reason, wait_s = answer["error"], 1.0
                        continue
                    del unanswered[answer["line"]]
                    line.error = answer.get("error")
                    line.is_stored = line.error is None
        if unanswered:
            raise _TryAgainError(reason, wait_s)

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """A block that sends lines. Unless they are refused, the service may have stored them, however it ends."""
        if self.writer is None:
            yield
            return
        before, self.writer.is_begun = self.writer.is_begun, True
        try:
            yield
        except JobsError:
            self.writer.is_begun = before
            raise

    # Writing.

    async def _write_all(self, after: int) -> None:
        while True:
            self._write_refused()
            while not (self._lines and self._lines[0].is_stored):
                if not self._lines and self._all_sent:
                    return
                await self._next_change()
                self._write_refused()
            after = await self._persist("results could not be read", self._read, after)

    def _write_refused(self) -> None:
        """Write the errors of the lines at the beginning that were not accepted."""
        while self._lines and self._lines[0].error is not None:
            self._write({"status": "error", "error": self._lines[0].error})

    async def _read(self, after: int) -> int:
        """Read results until the answer ends, and write them; returns the last line.

        Raises `_TryAgainError`, and `JobsError` where the jobs were removed.
        """
        path = f"/batches/{self.batch_id}/results"
        before = after
        try:
            async with self.http.stream("GET", path, params={"after": after}) as response:
                if response.status_code == HTTPStatus.NOT_FOUND:
                    raise self._removed()
                async for result in self._lines_of(response):
                    if not self._lines or (result["line"] > self._lines[-1].number and not self._all_sent):
                        return after  # of a line that a run before has sent, and this one has not read yet
                    after = result["line"]
                    self._write_result(result)
        except httpx.TransportError:
            if after == before:
                raise
        if after == before:
            response = await self.http.get(f"/batches/{self.batch_id}")
            if response.is_success and BatchView.model_validate_json(response.content).finished_at is not None:
                raise self._removed()
            raise _TryAgainError("the service stops")
        return after

    def _removed(self) -> JobsError:
        return JobsError(
            f"{self.client.name} has no jobs of batch {self.batch_id} from line {self._lines[0].number} on any more: "
            "they were removed before their results were read; submit those lines again"
        )

    def _write_result(self, result: Mapping[str, Any]) -> None:
        while self._lines and self._lines[0].number < result["line"]:
            error = self._lines[0].error or "the result is not there any more: the job was removed"
            self._write({"status": "error", "error": error})
        if not self._lines or self._lines[0].number > result["line"]:
            return  # of a line that others have added to the batch, or that this file has no more
        if result["status"] == "succeeded":
            self._write(result["result"])
        else:
            self._write({"status": "error", "error": result["error"] or f"the job was {result['status']}"})

    def _write(self, result: Mapping[str, Any]) -> None:
        line = self._lines.popleft()
        self._bytes -= len(line.content)
        kept = {} if self.kept_beside is None else kept_columns(line.record, self.kept_beside)
        if self.writer is not None:
            self.writer.write({**kept, **result})
        self.written += 1
        self._count(line.record, result["error"] if result["status"] == "error" else None)
        self._tell_change()

    async def _count_ended(self) -> None:
        """Ask again and again how many jobs have ended: results are written in order, and one line may hold up many."""
        pause_s = COUNTING_INTERVAL_S
        while True:
            await anyio.sleep(pause_s)
            asked_at = time.monotonic()
            with suppress(httpx.TransportError, ValidationError):
                response = await self.http.get(f"/batches/{self.batch_id}")
                statuses = BatchView.model_validate_json(response.content).statuses
                self._ended = sum(count for status, count in statuses.items() if status.has_ended)
                self._show_progress()
            pause_s = max(COUNTING_INTERVAL_S, COUNTING_PAUSE_FACTOR * (time.monotonic() - asked_at))

    # Both.

    def _count(self, record: Record, error: str | None) -> None:
        if error is not None:
            self.failed += 1
            if self.failed <= SHOWN_ERRORS:
                notices.print(f"{record.place}: {error}")
        self._show_progress()

    def _show_progress(self) -> None:
        if self.on_progress is not None:
            lines = self.sent if self.writer is None else self.written
            self.on_progress(completed=max(self.done + lines, self._ended))

    async def _lines_of(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        """The lines of an answer. Raises `_TryAgainError`, and `JobsError` for a refusal."""
        if response.status_code != HTTPStatus.OK:
            await response.aread()
            error = self.client.error_of(response)
            if response.status_code in TRANSIENT:
                after = response.headers.get("retry-after", "")
                raise _TryAgainError(str(error), float(after) if after.isdecimal() else None)
            raise error
        if self._away_at is not None:
            waited_s, self._away_at = time.monotonic() - self._away_at, None
            notices.print(f"{self.client.name} answers again, after {waited_s:.0f} s")
        rest = b""
        async for chunk in response.aiter_bytes():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in filter(None, lines):  # an empty one is sent in pauses
                try:
                    answer = _LINE.validate_json(line)
                except ValidationError as error:  # as of a proxy that shows a page in place of the service
                    raise _TryAgainError("it answers as no modalkit of this version does") from error
                yield answer

    async def _persist(self, what: str, attempt: Callable[[T], Awaitable[R]], argument: T) -> R:
        """Await an attempt until it succeeds. Raises `AwayError` once it has failed for `patience_s` seconds."""
        failed_at, attempts = None, 0
        while True:
            try:
                return await attempt(argument)
            except (_TryAgainError, httpx.TransportError) as error:
                now = time.monotonic()
                failed_at, attempts = failed_at or now, attempts + 1
                reason = str(error) or type(error).__name__
                if now - failed_at > self.patience_s:
                    raise AwayError(f"{self.client.name}: {what} for {self.patience_s:g} s: {reason}") from error
                if attempts > 1 and self._away_at is None:
                    self._away_at = failed_at
                    notices.print(
                        f"{self.client.name}: {what}: {reason}; trying again for {self.patience_s:g} s (--patience)",
                    )
                wait_s = getattr(error, "wait_s", None)
                pause_s = backoff_with_jitter(attempts, first_s=0.1, longest_s=LONGEST_WAIT_S, factor=2)
                await anyio.sleep(min(pause_s if wait_s is None else wait_s, LONGEST_WAIT_S))

    def _tell_change(self) -> None:
        self._change.set()

    async def _next_change(self) -> None:
        self._change = anyio.Event()
        await self._change.wait()
