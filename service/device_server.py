"""The process of a device: loads a pipeline, and runs the calls of its methods for the process that started it."""

import asyncio
import os
import pickle
import sys
import threading
import traceback
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from modalkit.batching.errors import as_exception
from modalkit.batching.execution import ensure_order
from modalkit.pipelines.engines.settings import EngineChoice
from modalkit.pipelines.inference_pipeline import awaited
from modalkit.service.errors import describe_error, error_text, restored
from modalkit.service.loading import ModelSource

KEPT = ("preprocess", "predict")
"""What these return stays in the process of the device."""
KEPT_RESULTS_PER_THREAD = 4
"""Results of stages that are kept there for each thread that calls. Each has two batches between stages at most, so
older results belong to batches that were given up."""


class Kept(NamedTuple):
    """Stands for the result of a stage, which stays in the process of the device."""

    number: int
    spent_s: float = 0.0
    """Seconds that the batch has spent in its stages."""


class Description(NamedTuple):
    """What the other process is told of the pipeline."""

    device_name: str
    max_in_flight: int
    engine_choice: EngineChoice | None


def serve(descriptor: int) -> None:
    """Load a pipeline and answer calls of its methods, until the connection ends."""
    with Connection(descriptor) as connection:
        source, device = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this one
        _Server(connection).serve(source, device)


class _Server:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._stopped: set[int] = set()
        self._threads: dict[int, ThreadPoolExecutor] = {}
        """One for each thread that calls, because libraries keep state for each thread."""

    def serve(self, source: ModelSource, device: str) -> None:
        try:
            self._pipeline = source.load(device)
            pipeline = self._pipeline
            description = Description(pipeline.device_name(), pipeline.max_in_flight, pipeline.engine_choice)
        except BaseException as error:  # noqa: BLE001  # the other process raises it
            self._answer_error(0, as_exception(error))
            return
        self._answer(0, "result", description)
        with suppress(EOFError, OSError):
            while True:
                number, thread, method = pickle.loads(self._connection.recv_bytes())  # noqa: S301  # as above
                pickled = self._connection.recv_bytes()
                if method == "end":
                    asyncio.run(awaited(self._pipeline.close()))
                    break
                if method == "stop":
                    self._stopped.add(number)
                    continue
                if thread not in self._threads:
                    self._threads[thread] = ThreadPoolExecutor(1, f"{source.model_name} {len(self._threads)}")
                self._threads[thread].submit(self._run, number, method, pickled)
        sys.stdout.flush()
        os._exit(0)  # a call that hangs must not keep the process

    def _run(self, number: int, method: str, pickled: bytes) -> None:
        try:
            function = getattr(self._pipeline, method)
            given = [self._taken(argument) for argument in pickle.loads(pickled)]  # noqa: S301  # as above
            items = list(given[0]) if given and isinstance(given[0], list) else []
            result = function(*given)
            if method == "predict_stream":
                for piece in result:
                    ensure_order(items, given[0])
                    self._answer(number, "piece", piece)
                    if number in self._stopped:
                        break
                result = None
            if items:
                ensure_order(items, given[0])
            if method in KEPT:
                result = self._keep(number, result)
            elif method == "warm_up":
                asyncio.run(awaited(result))
                result = None
            self._answer(number, "result", result)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the other process raises it
            self._answer_error(number, error)
        finally:
            self._stopped.discard(number)

    def _keep(self, number: int, result: Any) -> Kept:
        with self._lock:
            self._kept[number] = result
            while len(self._kept) > KEPT_RESULTS_PER_THREAD * len(self._threads):
                self._kept.popitem(last=False)
        return Kept(number)

    def _taken(self, argument: Any) -> Any:
        if not isinstance(argument, Kept):
            return argument
        with self._lock:
            return self._kept.pop(argument.number)

    def _answer_error(self, number: int, error: BaseException) -> None:
        error.add_note("".join(["in another process:\n", *traceback.format_exception(error)]))
        self._answer(number, "error", error)

    def _answer(self, number: int, kind: str, value: Any) -> None:
        """Raises `RuntimeError` for a value that cannot be written."""
        written = BytesIO()
        try:
            _Pickler(written).dump(value)
        except Exception as error:  # objects of a user may raise anything
            raise RuntimeError(f"{type(value).__name__} cannot go to another process: {error}") from error
        with self._lock, suppress(OSError):  # the other process may have ended
            self._connection.send_bytes(pickle.dumps((number, kind)))
            self._connection.send_bytes(written.getbuffer())


class _Pickler(pickle.Pickler):
    """Writes exceptions so that they can be read, also where their constructors take other arguments than `args`."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, BaseException) or _can_be_read(obj):
            return NotImplemented
        args = obj.args if _can_be_read(obj.args) else (error_text(obj),)
        reduced = type(obj), args, {name: value for name, value in vars(obj).items() if _can_be_read(value)}
        with suppress(Exception):  # a class that is local to a function, a `__new__` that needs arguments
            restored(*reduced)
            if _can_be_read(reduced):
                return restored, reduced
        return RuntimeError, (describe_error(obj),)


def _can_be_read(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))  # noqa: S301  # of our own process
    except Exception:  # noqa: BLE001  # objects of a user may raise anything
        return False
    return True
