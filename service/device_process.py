"""Pipelines in processes of their own, so that several devices do not wait for one Python interpreter."""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Pipe
from queue import Empty, SimpleQueue
from typing import Any

from pydantic import BaseModel

from modalkit.batching import BatchTimeoutError, Preparation
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.pipelines.inference_pipeline import has_own
from modalkit.service.device_server import Description, Kept, serve
from modalkit.service.errors import ServiceError, describe_error
from modalkit.service.loading import LoadError, ModelSource
from modalkit.service.pipeline_batches import is_asynchronous_pipeline, is_device_fault

logger = logging.getLogger(__name__)

TIMEOUT_SHARE = 0.95
"""Of the batch timeout: a process whose batch takes longer is ended, before the scheduler gives the batch up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before a process that ended is started again; each start that fails doubles the pause."""
CLOSE_S = 4.0


class DeviceProcessError(ServiceError):
    """Raised for a batch whose process ended, or was ended because its device is lost."""

    def __init__(self, device: str, what: str) -> None:
        super().__init__(f"the process of device {device} {what}")


class _OverdueError(Exception):
    """Raised for a call that took longer than its time limit; its process was ended."""


class _Process:
    """A process that has loaded a pipeline. Any number of threads may call its methods at once."""

    def __init__(self, source: ModelSource, device: str) -> None:
        """Start to load; `wait_until_ready` waits for it."""
        self._device = device
        self._lock = threading.Lock()
        self._number = 0
        self._answers: dict[int, SimpleQueue[tuple[str, bytes]]] = {0: SimpleQueue()}
        self._end: tuple[str, bytes] | None = None
        """The answer to all calls once the process has ended."""
        self.has_ended = False
        """Whether it answers no more calls."""
        self._connection, theirs = Pipe()
        with theirs:
            # Not by `multiprocessing`, which would run the main module of this program once more.
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {serve.__module__} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for this process, which then finishes what was accepted
            )
        self._connection.send_bytes(pickle.dumps((source, device)))
        threading.Thread(target=self._read, name=f"answers of {device}", daemon=True).start()

    def wait_until_ready(self) -> Description:
        """Wait until the pipeline is loaded. Raises what its constructor raised, and `DeviceProcessError`."""
        description: Description = self._result(0, None)
        return description

    def call(self, timeout_s: float | None, method: str, *arguments: Any) -> Any:
        """Call a method of the pipeline there, and return its result or raise its error.

        Raises `_OverdueError` after `timeout_s`, when it ends the process, and `DeviceProcessError`.
        """
        number = self._send(method, arguments)
        try:
            return self._result(number, timeout_s)
        finally:
            del self._answers[number]

    def stream(self, timeout_s: float, method: str, *arguments: Any) -> Iterator[Any]:
        """As `call`, for a generator: yields what it yields, all within `timeout_s`.

        Closing it closes the generator there.
        """
        ends_s = time.monotonic() + timeout_s
        number, has_ended = self._send(method, arguments), False
        try:
            while True:
                kind, value = self._next(number, ends_s - time.monotonic())
                if kind == "piece":
                    yield value
                    continue
                has_ended = True
                if kind == "error":
                    raise value
                return
        finally:
            del self._answers[number]
            if not has_ended:
                self._write(number, "stop", ())

    def end(self) -> None:
        """End the process. No call may run."""
        self._write(0, "end", ())
        try:
            self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once. Calls that run raise `DeviceProcessError`."""
        self.has_ended = True
        self._child.kill()
        self._child.wait()

    def _send(self, method: str, arguments: tuple[Any, ...]) -> int:
        with self._lock:
            self._number += 1
            number = self._number
        self._answers[number] = SimpleQueue()
        if self._end is not None:  # `_read` may have answered those that waited before
            self._answers[number].put(self._end)
        try:
            self._write(number, method, arguments)
        except BaseException:
            del self._answers[number]
            raise
        return number

    def _write(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        pickled = pickle.dumps(arguments)  # raises what the items raise
        with self._lock, suppress(OSError):  # it has ended: `_read` says so to all that wait
            self._connection.send_bytes(pickle.dumps((number, threading.get_ident(), method)))
            self._connection.send_bytes(pickled)

    def _result(self, number: int, timeout_s: float | None) -> Any:
        kind, value = self._next(number, timeout_s)
        if kind == "error":
            raise value
        return value

    def _next(self, number: int, timeout_s: float | None) -> tuple[str, Any]:
        if timeout_s is None or timeout_s > 0:
            with suppress(Empty):
                kind, pickled = self._answers[number].get(timeout=timeout_s)
                return kind, pickle.loads(pickled)  # noqa: S301  # of our own process
        self.kill()
        return "error", _OverdueError()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, kind = pickle.loads(self._connection.recv_bytes())  # noqa: S301  # as above
                pickled = self._connection.recv_bytes()
                if (answers := self._answers.get(number)) is not None:
                    answers.put((kind, pickled))
        self.has_ended = True
        code = self._child.wait()
        how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._end = "error", pickle.dumps(DeviceProcessError(self._device, how))
        for answers in list(self._answers.values()):
            answers.put(self._end)


class DevicePipeline(InferencePipeline):
    """A pipeline on another device, in a process of its own.

    A process that ends is started again by `preparation`. One whose batch takes longer than `batch_timeout_s` is
    ended, so that a batch that hangs does not keep its device; so is one whose device is lost. `close` ends it.
    """

    def __init__(self, source: ModelSource, device: str, batch_timeout_s: float) -> None:
        super().__init__(source.model_name)
        self._source = source
        self._device = device
        self._batch_timeout_s = batch_timeout_s
        self._lock = threading.Lock()
        self._pause_s = FIRST_PAUSE_S
        self._closed = threading.Event()
        self._is_ready = False  # it has loaded, and after the first time also warmed up
        self._process = _Process(source, device)

    def wait_until_loaded(self, first: InferencePipeline) -> None:
        """Wait for the process, and take from `first` what is the same on all devices. Raises `LoadError`."""
        key = f"{self._source.key}.devices: {self._device}"
        if is_asynchronous_pipeline(first):
            raise LoadError(f"{key}: an asynchronous pipeline cannot run on several devices; set max_in_flight instead")
        try:
            self._description = self._process.wait_until_ready()
        except Exception as error:
            raise LoadError(f"{key}: {describe_error(error)}") from error
        self._is_ready = True
        self.engine_choice = self._description.engine_choice
        self.max_in_flight = self._description.max_in_flight
        self.model_entry = first.model_entry
        self.input_model = first.input_model  # type: ignore[misc]  # of the class elsewhere, here of each instance
        self.output_model = first.output_model  # type: ignore[misc]
        self.cost_feature = first.cost_feature
        self.retryable_errors = first.retryable_errors  # type: ignore[misc]
        self.item_size = first.item_size  # type: ignore[method-assign]
        self.sample_items = first.sample_items  # type: ignore[method-assign]

    def device_name(self) -> str:  # noqa: D102  # these are documented in the base class
        return self._description.device_name

    def warm_up(self) -> None:  # noqa: D102  # as above
        self._process.call(None, "warm_up")

    def before_predict(self, in_flight: int) -> None:  # noqa: D102  # as above
        self._process.call(None, "before_predict", in_flight)

    def on_volume_reload(self) -> None:  # noqa: D102  # as above
        self._process.call(None, "on_volume_reload")

    def close(self) -> None:  # noqa: D102  # as above
        self._closed.set()
        self._process.end()

    def _call(self, method: str, items: list[BaseModel], *data: Any) -> Any:
        """Run a stage. Raises `BatchTimeoutError` and ends the process when the batch takes too long."""
        spent_s = sum(each.spent_s for each in data if isinstance(each, Kept))
        process, started_s = self._process, time.monotonic()
        with self._ending(process, items):
            result = process.call(self._limit_s - spent_s, method, items, *data)
        if isinstance(result, Kept):
            return result._replace(spent_s=spent_s + time.monotonic() - started_s)
        return result

    @property
    def _limit_s(self) -> float:
        return TIMEOUT_SHARE * self._batch_timeout_s

    @contextmanager
    def _ending(self, process: _Process, items: list[BaseModel]) -> Iterator[None]:
        """A block that runs a batch: ends the process where it can run no other one, and says why the batch failed."""
        try:
            yield
        except _OverdueError:
            raise BatchTimeoutError(self._batch_timeout_s, len(items)) from None
        except Exception as error:
            if not is_device_fault(error):
                raise
            process.kill()
            why = f"was ended, because its device is lost ({describe_error(error)})"
            raise DeviceProcessError(self._device, why) from error

    @property
    def preparation(self) -> Preparation:
        """What starts the process again if it has ended."""
        return Preparation(self._must_start, self._start)

    def _must_start(self) -> bool:
        return (self._process.has_ended or not self._is_ready) and not self._closed.is_set()

    def _start(self) -> None:
        """Start the process again, if it still has to be, and wait until it has loaded and warmed up, after a pause.

        Each failure doubles the pause. Raises what the constructor and the warm-up raise, and `DeviceProcessError`.
        """
        with self._lock:
            if not self._must_start():
                return
            self._is_ready = False
            logger.warning("The process of device %s has ended; starting it again", self._device)
            if self._closed.wait(self._pause_s):
                return
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._process = _Process(self._source, self._device)
            if self._closed.is_set():  # `close` may have ended the one before it
                self._process.kill()
                return
            try:
                self._process.wait_until_ready()
                self._process.call(None, "warm_up")
            except BaseException:
                self._process.kill()
                raise
            self._pause_s, self._is_ready = FIRST_PAUSE_S, True


class _InStages(DevicePipeline):
    def preprocess(self, input_list: list[BaseModel]) -> Any:
        return self._call("preprocess", input_list)

    def predict(self, input_list: list[BaseModel], preprocessed_data: Any) -> Any:
        return self._call("predict", input_list, preprocessed_data)

    def postprocess(self, input_list: list[BaseModel], raw_output: Any) -> list[InferenceOutputModel]:
        outputs: list[InferenceOutputModel] = self._call("postprocess", input_list, raw_output)
        return outputs


class _AsOne(DevicePipeline):
    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        outputs: list[InferenceOutputModel] = self._call("run_inference", input_list)
        return outputs


class _InPieces(DevicePipeline):
    def predict_stream(self, input_list: list[BaseModel]) -> Iterator[Sequence[InferenceOutputModel | None]]:
        process = self._process
        with self._ending(process, input_list):
            yield from process.stream(self._limit_s, "predict_stream", input_list)


def load_on_devices(source: ModelSource) -> list[InferencePipeline]:
    """Load the pipeline on each of its devices: on the first in this process, on each other in one of its own.

    It takes seconds, and may run in any thread. Raises `LoadError`.
    """
    first_device, *other_devices = source.devices()
    if not other_devices:
        return [source.load(first_device)]
    own = partial(has_own, source.pipeline_class)
    kind = _InPieces if own("predict_stream") else _AsOne if own("run_inference") else _InStages
    timeout_s = source.settings.app_settings.batch_config.batch_timeout_seconds
    others = [kind(source, device, timeout_s) for device in other_devices]  # they load while this process does
    try:
        first = source.load(first_device)
        for other in others:
            other.wait_until_loaded(first)
    except BaseException:
        for other in others:
            other.close()
        raise
    return [first, *others]
