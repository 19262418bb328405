"""Partial results: the pieces of the items of one batch, and how they reach their callers."""

import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager

import anyio
from anyio.lowlevel import current_token
from pydantic import BaseModel

from modalkit.batching import DeadlineExceededError, Failure, Outcome, Success
from modalkit.batching.errors import raise_anew, users_error
from modalkit.batching.execution import checked_outputs, ensure_order
from modalkit.batching.wakeup import asyncio_loop
from modalkit.pipelines import InferenceOutputModel, RejectItem
from modalkit.service.errors import ServiceError, lone_error

Output = InferenceOutputModel | Exception
OnPiece = Callable[[InferenceOutputModel], None]


MAX_UNREAD_PIECES = 64
"""Pieces of one result that wait until their caller takes them."""


class StreamCutError(ServiceError):
    """Raised for an item whose batch ran into the batch timeout after a piece of it was sent."""

    def __init__(self) -> None:
        super().__init__(
            "the batch took longer than batch_config.batch_timeout_seconds, after a part of the result was sent; raise "
            "that limit, or let the pipeline generate less"
        )


class NoPieceError(ServiceError):
    """Raised for an item for which `predict_stream` yielded no piece."""

    def __init__(self) -> None:
        super().__init__("predict_stream yielded no piece for this item; its last piece is its result")


class StreamedItem:
    """An item whose caller gets each piece at once, by a call of `on_piece` in the event loop.

    Its caller sets `is_wanted` to False when it waits no longer. An item of which a piece was sent does not run again,
    unless it `may_repeat`: then pieces of the next run follow. Made in the event loop.
    """

    def __init__(self, item: BaseModel, on_piece: OnPiece, *, may_repeat: bool = False) -> None:
        self.item = item
        self.may_repeat = may_repeat
        self.is_wanted = True
        self.error: Exception | None = None
        """The error of the batch, after a piece was sent."""
        self.has_pieces = False
        self.run: StreamRun | None = None
        """The run whose pieces count: one that was abandoned after the batch timeout may still yield others."""
        self.token = current_token()
        self._on_piece = on_piece

    def accept(self, run: "StreamRun", piece: InferenceOutputModel) -> None:
        """Pass a piece on, in the event loop, if it is still wanted."""
        if self.is_wanted and self.run is run:
            self.has_pieces = not self.may_repeat
            self._on_piece(piece)


Payload = BaseModel | StreamedItem


def item_of(payload: Payload) -> BaseModel:
    """The item of a request."""
    return payload.item if isinstance(payload, StreamedItem) else payload


class StreamRun:
    """One run of a batch by `predict_stream`. `check` makes a piece an output; `in_thread` says where the run is."""

    def __init__(self, payloads: Sequence[Payload], check: Callable[[object], Output], *, in_thread: bool) -> None:
        self._payloads = payloads
        self._check = check
        self._in_thread = in_thread
        self._outputs: list[Output | None] = [None] * len(payloads)
        self._sent: set[StreamedItem] = set()
        for place, payload in enumerate(payloads):
            if isinstance(payload, StreamedItem):
                if payload.error is not None or payload.has_pieces:
                    self._outputs[place] = payload.error or StreamCutError()
                payload.run = self
        self._places = [place for place, output in enumerate(self._outputs) if output is None]
        self._items = [item_of(payloads[place]) for place in self._places]
        self.items = list(self._items)
        """The items to run, for the pipeline; those of which pieces were sent in an earlier run are left out."""

    def take(self, step: object) -> bool:
        """Take what the pipeline yielded for these items; returns whether more is wanted.

        Raises `OutputCountError`, and `InputsMovedError` once the pipeline has removed or moved `items`.
        """
        ensure_order(self._items, self.items)
        pieces = list[tuple[StreamedItem, InferenceOutputModel]]()
        for place, piece in zip(self._places, checked_outputs(step, len(self._places)), strict=True):
            if piece is None or isinstance(self._outputs[place], Exception):
                continue
            output = self._outputs[place] = self._check(piece)
            payload = self._payloads[place]
            if isinstance(payload, StreamedItem) and not isinstance(output, Exception):
                pieces.append((payload, output))
        self._send(pieces)
        return any(map(self._is_wanted, self._places))

    def outputs(self) -> list[Output]:
        """The last piece, or the error, of each item; an error, too, where a caller left, and the run may be cut short.

        So no costs are learnt from a run that most callers left.
        """
        return [
            output
            if output is not None and (isinstance(output, Exception) or self._is_wanted(place))
            else NoPieceError()
            for place, output in enumerate(self._outputs)
        ]

    @contextmanager
    def errors(self) -> Generator[None]:
        """A block that runs the pipeline: keeps an error as that of the items of which pieces were sent."""
        try:
            yield
        except BaseException as raised:
            error = users_error(raised)
            lone = lone_error(error)
            if isinstance(lone, RejectItem) and len(self._places) == 1:
                self._outputs[self._places[0]] = lone.with_traceback(None)
                return
            for payload in self._sent:
                payload.error = error
            del error, lone  # else they and this frame refer to each other until garbage collection
            raise

    def _is_wanted(self, place: int) -> bool:
        payload = self._payloads[place]
        if isinstance(self._outputs[place], Exception):
            return False
        return not isinstance(payload, StreamedItem) or (payload.is_wanted and payload.run is self)

    def _send(self, pieces: list[tuple[StreamedItem, InferenceOutputModel]]) -> None:
        if not pieces:
            return
        self._sent.update(payload for payload, _ in pieces if not payload.may_repeat)
        if not self._in_thread:
            self._accept(pieces)
            return
        token = pieces[0][0].token
        # Before the end of the batch, which comes the same way.
        if (loop := asyncio_loop(token)) is not None:
            loop.call_soon_threadsafe(self._accept, pieces)
        else:
            token.backend_class.run_sync_soon(self._accept, (pieces,), token.native_token)

    def _accept(self, pieces: Iterable[tuple[StreamedItem, InferenceOutputModel]]) -> None:
        for payload, piece in pieces:
            payload.accept(self, piece)


async def pieces_of(
    item: BaseModel,
    submit: Callable[[Payload, Callable[[Outcome[InferenceOutputModel]], None]], Callable[[], object]],
    timeout_s: float | None,
    *,
    streams: bool,
) -> AsyncGenerator[InferenceOutputModel | Success[InferenceOutputModel]]:
    """What a request receives: its pieces, of which a slow caller misses the oldest, and then its `Success`.

    `submit` queues a payload, with a function for its outcome, and returns what withdraws it. `streams` says whether
    the pipeline takes a `StreamedItem`. Raises the request's error, and `DeadlineExceededError` after `timeout_s`
    seconds for all pieces.
    """
    received: deque[InferenceOutputModel | Outcome[InferenceOutputModel]] = deque(maxlen=MAX_UNREAD_PIECES)
    change = anyio.Event()

    def receive(piece: InferenceOutputModel | Outcome[InferenceOutputModel]) -> None:
        received.append(piece)
        change.set()

    streamed = StreamedItem(item, receive)
    withdraw = submit(streamed if streams else item, receive)
    try:
        deadline_s = math.inf if timeout_s is None else anyio.current_time() + timeout_s
        while True:
            while received:
                piece = received.popleft()
                if isinstance(piece, Failure):
                    raise_anew(piece.error)
                yield piece
                if isinstance(piece, Success):
                    return
            change = anyio.Event()
            with anyio.CancelScope(deadline=deadline_s) as scope:
                await change.wait()
            if scope.cancelled_caught:
                raise DeadlineExceededError(timeout_s or 0.0)
    finally:
        streamed.is_wanted = False
        withdraw()
