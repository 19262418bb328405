"""``POST /batch/predict`` with a stream of items: each is answered once it is done, or in the order of the items."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice, takewhile

import anyio
from pydantic import BaseModel

from modalkit.batching import DeadlineExceededError, Failure, Outcome, QueueFullError
from modalkit.batching.task_groups import plain_task_group
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.web.auth import Caller
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.line_models import FindTarget, Target, parse_lines
from modalkit.service.web.lines import Line, Lines
from modalkit.service.web.options import StreamOptions
from modalkit.service.web.problems import outcomes_json, slot_json

MAX_ITEMS_IN_FLIGHT = 1024
"""Items of one stream that wait, run, or wait to be answered in order."""
MAX_BYTES_IN_FLIGHT = 2**23
"""The bytes of their lines, beyond which no more are taken."""
WRITE_INTERVAL_S = 0.002
"""Seconds that answers wait for others while more items of their stream run."""
WRITE_ITEMS, WRITE_BYTES = 32, 2**16
"""Answers that are made at once, and bytes of them after which other requests have their turn."""
FULL_QUEUE_RETRY_S = 0.05
"""Seconds between two attempts to queue an item while the model's queue is full; an item that ends shortens them."""


_Asked = tuple[BaseModel | Failure, int, Target]
"""What a line asks for, the bytes of the line, and the model for it."""


class PredictionStream:
    """Runs the items of one stream: a limited number at a time, however many there are."""

    def __init__(self, find: FindTarget, options: StreamOptions, caller: Caller) -> None:
        self._target = find(options.model_name)
        self._find = find if self._target.parser.may_name_model else None
        self._options = options
        self._caller = caller
        # All mutable state.
        self._index = 0  # of the next item
        # Items that wait or run, by index: the bytes of the line, the start, and what withdraws the item.
        self._running: dict[int, tuple[int, float, Callable[[], object]]] = {}
        self._bytes = 0  # of the lines of these items
        self._done: dict[int, Outcome[InferenceOutputModel]] = {}  # that are not answered yet, by index
        self._next = 0  # the index of the next answer
        self._will_flush = False  # whether a call that writes answers is due
        self._change = anyio.Event()  # wakes the task that takes lines
        self._beginning = anyio.Event()  # wakes the task that ends items whose time is over
        self._write: Callable[[bytes], None]

    async def answer(self, lines: Lines, write: Callable[[bytes], None]) -> None:
        """Run the items of all lines, and answer each. When cancelled, those that wait leave the queue."""
        self._write = write
        try:
            async with plain_task_group() as task_group:
                if self._options.timeout_s is not None:
                    task_group.start_soon(self._expire, self._options.timeout_s)
                async for some in lines:
                    await self._run(some)
                await self._until(lambda: not self._in_flight)
                task_group.cancel_scope.cancel()
        finally:
            for _, _, withdraw in self._running.values():
                withdraw()
            self._done.clear()

    @property
    def _in_flight(self) -> int:
        return len(self._running) + len(self._done)

    async def _run(self, lines: Sequence[Line]) -> None:
        """Start the items of lines, as many as there is room for in this stream and in the model's queue."""
        await self._caller.wait_for_items(len(lines))
        sizes = [len(line.content) if isinstance(line.content, bytes) else 0 for line in lines]
        items, targets = await parse_lines(lines, BodyParser.item_lines, self._target, self._find)
        asked = list(zip(items, sizes, targets, strict=True))
        together = _of_one_model(asked)
        while asked:
            # Many at a time, because waking up for each batch costs more than the items.
            await self._until(lambda: self._in_flight <= MAX_ITEMS_IN_FLIGHT // 2 and self._bytes < MAX_BYTES_IN_FLIGHT)
            together = min(together, MAX_ITEMS_IN_FLIGHT - self._in_flight)
            try:
                self._start(asked[:together])
            except QueueFullError:
                if together == 1:
                    with anyio.move_on_after(FULL_QUEUE_RETRY_S):
                        await self._next_change()
                together = max(1, together // 2)
            else:
                asked = asked[together:]
                together = _of_one_model(asked)

    def _start(self, group: Sequence[_Asked]) -> None:
        """Start items of one model, and answer those that are refused.

        Raises `QueueFullError` before any has started.
        """
        first = self._index
        valid = [(index, item) for index, (item, _, _) in enumerate(group, first) if not isinstance(item, Failure)]
        started = iter(self._queue(group[0][2], [item for _, item in valid], [index for index, _ in valid]))
        self._index += len(group)
        now_s = anyio.current_time()
        for index, (item, size_bytes, _) in enumerate(group, first):
            handle = item if isinstance(item, Failure) else next(started)
            if isinstance(handle, Failure):
                self._end(index, handle)
            else:
                self._running[index] = size_bytes, now_s, handle
                self._bytes += size_bytes
        self._beginning.set()

    def _queue(
        self, target: Target, items: Sequence[BaseModel], indices: Sequence[int]
    ) -> Sequence[Callable[[], object] | Failure]:
        end = self._end

        def on_outcome(number: int, outcome: Outcome[InferenceOutputModel]) -> None:
            end(indices[number], outcome)

        try:
            return target.model.predict_many_nowait(
                items, on_outcome, priority=self._options.priority, owner=self._caller.owner
            )
        except QueueFullError:
            raise
        except Exception as error:  # noqa: BLE001  # such as the closing of the service
            return [Failure(error)] * len(items)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            await self._next_change()

    async def _next_change(self) -> None:
        self._change = anyio.Event()
        await self._change.wait()

    async def _expire(self, timeout_s: float) -> None:
        """End items whose time is over; they started in the order of their indices."""
        while True:
            oldest = next(iter(self._running.items()), None)
            if oldest is None:
                self._beginning = anyio.Event()
                await self._beginning.wait()
                continue
            index, (_, started_s, withdraw) = oldest
            left_s = started_s + timeout_s - anyio.current_time()
            if left_s > 0:
                await anyio.sleep(left_s)
            else:
                withdraw()
                self._end(index, Failure(DeadlineExceededError(timeout_s)))

    def _end(self, index: int, outcome: Outcome[InferenceOutputModel]) -> None:
        """Have an item answered, soon or in its turn; called in the event loop with its outcome."""
        if (running := self._running.pop(index, None)) is not None:
            self._bytes -= running[0]
        if not self._will_flush:
            self._will_flush = True
            # Those of several batches together, because each writing takes as long as several items.
            delay_s = WRITE_INTERVAL_S if self._running else 0.0
            asyncio.get_running_loop().call_later(delay_s, self._flush)
        self._done[index] = outcome

    def _flush(self) -> None:
        """Write answers; others have their turn before the rest, where these are large."""
        self._will_flush = False
        answers, size_bytes = list[bytes](), 0
        while (indices := self._ready()) and size_bytes <= WRITE_BYTES:
            outcomes = [self._done.pop(index) for index in indices]
            slots = outcomes_json(outcomes, slot_json)
            answers += map(_line, indices, slots)
            size_bytes += sum(map(len, slots))
            self._next += len(indices)
        if answers:
            self._write(b"".join(answers))
        if indices:
            self._will_flush = True
            asyncio.get_running_loop().call_soon(self._flush)
        self._change.set()

    def _ready(self) -> list[int]:
        """The indices of the next items that can be answered."""
        if self._options.ordered:
            return list(takewhile(self._done.__contains__, range(self._next, self._next + WRITE_ITEMS)))
        return list(islice(self._done, WRITE_ITEMS))


def _line(index: int, slot: bytes) -> bytes:
    return b'{"index":%d%b%b\n' % (index, b"" if slot == b"{}" else b",", slot[1:])


def _of_one_model(asked: Sequence[_Asked]) -> int:
    """How many of these are for the model of the first one, up to the first for another."""
    return next((place for place, (_, _, target) in enumerate(asked) if target is not asked[0][2]), len(asked))
