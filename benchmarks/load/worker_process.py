"""One process of the load generator: sends what it is told to, tells how far it is, and returns what it measured."""

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import uvloop

from modalkit.benchmarks.load.arrivals import arrival_times
from modalkit.benchmarks.load.loops import Call, Samples, closed_loop, open_loop
from modalkit.benchmarks.load.plan import Load

TELL_EVERY_S = 0.25
READY, GO, STOP = "ready", "go", "stop"


class CallTarget(Protocol):
    """What a process can be sent to put load on. It is pickled, and opened in that process."""

    def opened(self) -> AbstractAsyncContextManager[Call]:
        """What sends requests."""
        ...  # a protocol method has no body


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one of several processes in a load."""

    target: CallTarget
    load: Load
    place: int = 0
    of: int = 1

    def clients(self) -> int:
        """How many clients this process has."""
        return _share(self.load.clients, self.place, self.of)

    def indices(self) -> "itertools.count[int] | range":
        """The indices of the requests of this process."""
        if self.load.requests is None:
            return itertools.count(self.place, self.of)
        return range(self.place, self.load.requests, self.of)


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a process measured: a row each for the times when requests were due, sent and ended."""

    times_s: npt.NDArray[np.float64]
    answered: npt.NDArray[np.int64]
    reasons: list[str]
    cpu_share: float
    """Of one core, that the process used while it sent."""
    list_length: int = 1
    """Items of a request."""
    kept: Sequence[Any] = ()
    """What the call kept: `HttpCaller` the bodies of answers, `ItemCall` the records of batches."""
    setup: Any = None
    """What runs the model of an `ItemCall`."""


def run_part(pipe: Connection) -> None:
    """Read a `Part`, open its target, say so, and at the word go put the load on it; send the result, or an error."""
    try:
        uvloop.run(_run(pipe.recv(), pipe))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has ended, or is about to end this one
    except BaseExceptionGroup as errors:
        pipe.send(RuntimeError(f"{type(errors.exceptions[0]).__name__}: {errors.exceptions[0]}"))
    except Exception as error:  # noqa: BLE001  # raised again by the parent
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


async def _run(part: Part, pipe: Connection) -> None:
    samples, stop, go = Samples(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        # A thread, since a loop that watched the pipe would make it non-blocking, and so break `pipe.send`.
        for event in (go, stop):
            with suppress(EOFError, OSError):  # the parent has ended: stop at once
                pipe.recv()
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(event.set)

    threading.Thread(target=listen, daemon=True).start()
    async with part.target.opened() as call:
        gc.collect()
        gc.freeze()
        pipe.send(READY)
        await go.wait()
        list_length = getattr(part.target, "list_length", 1)  # what is not HTTP takes single items
        telling = asyncio.create_task(_tell(samples, list_length, pipe))
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await _send(part, call, samples, stop)
        cpu_share = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
        telling.cancel()
        times_s, answered, reasons = samples.columns()
        kept, setup = getattr(call, "kept", ()), getattr(call, "setup", None)
        pipe.send(PartResult(times_s, answered, reasons, cpu_share, list_length, kept, setup))


async def _send(part: Part, call: Call, samples: Samples, stop: asyncio.Event) -> None:
    load = part.load
    if load.is_open:
        times_s = arrival_times(load.arrivals, load.rate_per_s, part.place, part.of, load.seed)
        await open_loop(call, iter(part.indices()), times_s, samples, stop, load.timeout_s)
    else:
        await closed_loop(call, iter(part.indices()), part.clients(), samples, stop)


async def _tell(samples: Samples, list_length: int, pipe: Connection) -> None:
    """Tell now and then how many items were answered and how many failed, for ever."""
    counted = answered = failed = 0
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        new: Any = samples.answered[counted:]
        counted += len(new)
        answered += (found := sum(count for count in new if count >= 0))
        failed += list_length * len(new) - found
        pipe.send((answered, failed))


def _share(total: int, place: int, of: int) -> int:
    return total // of + (place < total % of)
