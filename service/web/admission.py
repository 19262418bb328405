"""Limits that all requests share: bytes held in memory, work in one pass of the event loop, the pace of refusals."""

import logging
import math
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http import HTTPStatus
from typing import ParamSpec, Self, TypeVar

import anyio
from fastapi import Request
from starlette.types import Scope

from modalkit.batching import QueueFullError
from modalkit.service.settings import RequestConfig
from modalkit.service.web.problems import ProblemError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

FREE_BYTES = 2**16
"""Bytes of a body, or of an answer, that do not count as held, so that small requests are served while others stall
with large ones."""
SLICE_ITEMS = 256
"""Maximum items that are processed without a pause; after each slice of them, other requests have their turn."""
SLICE_S = 0.005
"""Seconds after which a slice of fewer items ends, because they are large."""
STEP_ITEMS = 16
"""Items of a slice between two looks at the clock."""
REFUSALS_PER_S = 100
"""Refusals a second that are answered at once; more of them would take the time of accepted requests."""
MAX_REFUSAL_DELAY_S = 1.0

_RECEPTION = "modalkit.reception"


class RefusalPace:
    """How long refusals wait, so that clients that ask again at once do not ask too often."""

    def __init__(self) -> None:
        self._credit = float(REFUSALS_PER_S)  # refusals that may be answered at once; less than 0 where some wait
        self._last_s = math.inf

    def delay_s(self, now: float) -> float:
        """Seconds that a refusal at the time `now` waits, up to `MAX_REFUSAL_DELAY_S`; 0 while there are few."""
        earned = max(0.0, now - self._last_s) * REFUSALS_PER_S
        self._last_s = now
        credit = min(self._credit + earned, REFUSALS_PER_S) - 1
        self._credit = max(credit, -MAX_REFUSAL_DELAY_S * REFUSALS_PER_S)
        return max(0.0, -self._credit / REFUSALS_PER_S)


class Admission:
    """What all requests of one application share: the bytes that they hold, and the turn of those that take long."""

    def __init__(self, limits: RequestConfig | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or RequestConfig()
        self.held_bytes = 0
        """Bytes of bodies that arrive or wait, and of answers that are sent, without the first `FREE_BYTES` of each."""
        self.cut_bodies = 0
        """How many bodies were cut by their clients."""
        self.turn = anyio.Lock()
        """Held for each slice of long work: in one pass of the event loop there is at most one slice."""
        self._pace = RefusalPace()
        self._now = now

    def count_cut_body(self, path: str) -> ProblemError:
        """Count a body that its client has cut; returns the problem of its request."""
        self.cut_bodies += 1
        detail = "the client disconnected before the end of the body"
        logger.debug("%s: %s", path, detail)
        return ProblemError(HTTPStatus.REQUEST_TIMEOUT, detail)

    async def check(self, check_room: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `check_room`, which raises what a request is refused with.

        Where there are many refusals for a full queue, they wait for up to a second, and there may be room by then.
        """
        try:
            check_room(*args, **kwargs)
        except QueueFullError:
            delay_s = self._pace.delay_s(self._now())
            if not delay_s:
                raise
        else:
            return
        await anyio.sleep(delay_s)
        check_room(*args, **kwargs)

    async def map(self, function: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T]) -> list[R]:
        """What a function makes of all items, one result of each, in slices. Between two slices, other tasks run."""
        results = list[R]()
        if len(items) <= SLICE_ITEMS:
            self._add_slice(results, function, items)
        while len(results) < len(items):
            async with self.turn:
                self._add_slice(results, function, items)
        return results

    def _add_slice(self, results: list[R], function: Callable[[Sequence[T]], Iterable[R]], items: Sequence[T]) -> None:
        first, end_s = len(results), self._now() + SLICE_S
        for start in range(first, min(first + SLICE_ITEMS, len(items)), STEP_ITEMS):
            results += function(items[start : start + STEP_ITEMS])
            if self._now() >= end_s:
                return


class Reception:
    """The bytes that one body, a part of a stream, or an answer holds, without the first `FREE_BYTES`; none after the
    context.
    """

    __slots__ = ("_admission", "_held_bytes")

    def __init__(self, admission: Admission, scope: Scope | None = None) -> None:
        """Hold nothing; with the `scope` of a request, be what `reception_of` finds for it."""
        self._admission = admission
        self._held_bytes = 0
        if scope is not None:
            scope[_RECEPTION] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held_bytes:
            self.hold(0)

    @property
    def limits(self) -> RequestConfig:
        """The limits that hold for it."""
        return self._admission.limits

    @property
    def is_full(self) -> bool:
        """Whether all requests together hold as much as they may."""
        return self._admission.held_bytes >= self._admission.limits.max_pending_bytes

    def hold(self, size_bytes: int) -> None:
        """Hold so many bytes, instead of those held before; `check_room` says whether they may be held."""
        held_bytes = max(0, size_bytes - FREE_BYTES)
        self._admission.held_bytes += held_bytes - self._held_bytes
        self._held_bytes = held_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raise `ProblemError` where all requests together would hold too much, if this one held so many bytes."""
        more_bytes = size_bytes - FREE_BYTES - self._held_bytes
        limit = self._admission.limits.max_pending_bytes
        if size_bytes > FREE_BYTES and self._admission.held_bytes + more_bytes > limit:
            raise _refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the service holds as many bytes of other requests as it may ({limit}, "
                "request_config.max_pending_bytes): retry later",
                **{"Retry-After": "1"},
            )

    def check_answer(self, size_bytes: int) -> None:
        """Raise `ProblemError` where all requests together would hold too much, with an answer of so many bytes too.

        A lone answer may be larger.
        """
        if self._admission.held_bytes > self._held_bytes:
            Reception(self._admission).check_room(size_bytes)

    def answer(self, size_bytes: int, *, may_be_refused: bool = True) -> AbstractContextManager[None]:
        """Hold so many bytes of the answer too while the context is open, which is until the client has taken them.

        Entering it raises what `check_answer` does, unless the request has changed something: then its answer is not
        to be refused.
        """
        return nullcontext() if size_bytes <= FREE_BYTES else self._hold_answer(size_bytes, may_be_refused)

    @contextmanager
    def _hold_answer(self, size_bytes: int, may_be_refused: bool) -> Generator[None]:
        if may_be_refused:
            self.check_answer(size_bytes)
        with Reception(self._admission) as held:
            held.hold(size_bytes)
            yield

    async def write(self, size_bytes: int, make: Callable[[], bytes], *, may_be_refused: bool = True) -> bytes:
        """What `make` returns, which takes long where it has many bytes, about `size_bytes`.

        Such answers, and parts of large bodies, are made one in each pass of the event loop. Raises as `answer` does.
        """
        if size_bytes <= FREE_BYTES:
            return make()
        with self.answer(size_bytes, may_be_refused=may_be_refused):
            async with self._admission.turn:
                return make()

    async def read(self, request: Request) -> bytes:
        """The whole body; see `read_body`."""
        self._check(declared_bytes(request) or 0)
        chunks, size_bytes, more = list[bytes](), 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise self._admission.count_cut_body(request.scope["path"])
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size_bytes += len(chunk)
            self._check(size_bytes)
            self.hold(size_bytes)
            chunks.append(chunk)
        if size_bytes <= FREE_BYTES:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        async with self._admission.turn:  # one large body in each pass of the event loop
            return b"".join(chunks)

    def _check(self, size_bytes: int) -> None:
        """Raise `ProblemError` for a body of this size that is too large, alone or together with what is held now."""
        limits = self._admission.limits
        if size_bytes > limits.max_body_bytes:
            raise _refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {limits.max_body_bytes} bytes (request_config.max_body_bytes): send several "
                "smaller requests",
            )
        self.check_room(size_bytes)


def reception_of(scope: Scope) -> Reception:
    """The reception of a request, which `DirectRoutes` makes; one of its own in an application without them."""
    reception: Reception | None = scope.get(_RECEPTION)
    return Reception(Admission()) if reception is None else reception


def declared_bytes(request: Request) -> int | None:
    """The size of the body, where the request declares it."""
    declared = request.headers.get("content-length", "")
    return int(declared.lstrip("0") or "0") if declared.isdecimal() else None  # Python reads 4300 digits at most


def read_body(request: Request) -> Awaitable[bytes]:
    """Read the whole body.

    Raises `ProblemError` for a body that is too large, alone or together with those of other requests, and if the
    client leaves before its end.
    """
    return reception_of(request.scope).read(request)


def _refused(status: HTTPStatus, detail: str, **headers: str) -> ProblemError:
    return ProblemError(status, detail, headers={"Connection": "close", **headers})
