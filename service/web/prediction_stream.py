"""``POST /batch/predict`` with a stream of items: each is answered once it is done, or in the order of the items."""

from collections.abc import Callable
from functools import partial

import anyio
from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, QueueFullError
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.gateway import Model
from modalkit.service.outputs import output_json
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.lines import Lines, parsed
from modalkit.service.web.options import StreamOptions
from modalkit.service.web.problems import slot_json

MAX_ITEMS_IN_FLIGHT = 1024
"""Items of one stream that wait, run, or wait to be answered in order."""
MAX_BYTES_IN_FLIGHT = 2**23
"""The bytes of their lines, beyond which no more are taken."""
FULL_QUEUE_RETRY_S = 0.05
"""Seconds until an item is tried again for which the model's queue had no room."""


class PredictionStream:
    """Runs the items of one stream by one model: a limited number at a time, however many there are."""

    def __init__(self, model: Model, parser: BodyParser, options: StreamOptions) -> None:
        self._model = model
        self._parser = parser
        self._options = options
        # All mutable state: the next item's index; how to withdraw the items in flight, and their bytes; answers that
        # wait for those before them, by index, and the index of the next answer; what wakes the task that takes lines.
        self._index = 0
        self._withdraw: dict[int, Callable[[], None]] = {}
        self._bytes = 0
        self._done: dict[int, bytes] = {}
        self._next = 0
        self._change = anyio.Event()
        self._write: Callable[[bytes], None]

    async def answer(self, lines: Lines, write: Callable[[bytes], None]) -> None:
        """Run the items of all lines, and answer each. When cancelled, those that wait leave the queue."""
        self._write = write
        try:
            async for some in lines:
                for line, item in zip(some, parsed(some, self._parser.item_lines), strict=True):
                    await self._run(item, len(line.content or b""))
            await self._until(lambda: not self._in_flight)
        finally:
            for withdraw in self._withdraw.values():
                withdraw()

    @property
    def _in_flight(self) -> int:
        return len(self._withdraw) + len(self._done)

    async def _run(self, item: BaseModel | Failure, size_bytes: int) -> None:
        """Start an item once there is room for it in this stream and in the model's queue."""
        if self._in_flight >= MAX_ITEMS_IN_FLIGHT or self._bytes >= MAX_BYTES_IN_FLIGHT:
            await self._until(lambda: self._in_flight < MAX_ITEMS_IN_FLIGHT and self._bytes < MAX_BYTES_IN_FLIGHT)
        index, self._index = self._index, self._index + 1
        end = partial(self._end, index, size_bytes)
        self._bytes += size_bytes
        while not isinstance(item, Failure):
            try:
                self._withdraw[index] = self._model.predict_nowait(
                    item, end, priority=self._options.priority, timeout_s=self._options.timeout_s
                )
            except QueueFullError:
                await anyio.sleep(FULL_QUEUE_RETRY_S)
            except Exception as error:  # noqa: BLE001  # what refuses the item is its error
                item = Failure(error)
            else:
                return
        end(item)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._change = anyio.Event()
            await self._change.wait()

    def _end(self, index: int, size_bytes: int, outcome: Outcome[InferenceOutputModel]) -> None:
        """Answer an item, at once or in its turn; called in the event loop with its outcome."""
        self._withdraw.pop(index, None)
        self._bytes -= size_bytes
        self._change.set()
        answer = b'{"index":%d,%s\n' % (index, _content(outcome)[1:])
        if not self._options.ordered:
            self._write(answer)
            return
        self._done[index] = answer
        while self._next in self._done:
            self._write(self._done.pop(self._next))
            self._next += 1


def _content(outcome: Outcome[InferenceOutputModel]) -> bytes:
    if isinstance(outcome, Failure):
        return slot_json(outcome.error)
    try:
        return output_json(outcome.value)
    except Exception as error:  # noqa: BLE001  # the output's own serializers may raise anything
        return slot_json(error)
