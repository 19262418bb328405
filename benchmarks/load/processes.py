"""Runs a load in processes of its own, as many as it takes, and joins what they measured."""

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait

import numpy as np

from modalkit.benchmarks.load.client import NO_CONNECTION, HttpTarget
from modalkit.benchmarks.load.endpoint import Endpoint, Item
from modalkit.benchmarks.load.figures import Measured, measured_of
from modalkit.benchmarks.load.loops import Call, Samples, closed_loop
from modalkit.benchmarks.load.plan import BenchError, Load
from modalkit.benchmarks.load.spawned import first_received, received, spawned
from modalkit.benchmarks.load.worker_process import GO, STOP, CallTarget, Part, PartResult, run_part

OnProgress = Callable[[float, int, int], object]
"""Called with the seconds since the begin, the items answered and those that failed."""

END_S = 10.0
"""That the processes have, beyond the time of their requests, to send what they measured."""
STEADY_WINDOW_S = 1.0
STEADY_WINDOWS = 6
STEADY_WITHIN = 0.02


def run_load(
    endpoint: Endpoint,
    items: Sequence[Item],
    load: Load,
    *,
    labels: Sequence[str] | None = None,
    keeps_bodies: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> Measured:
    """Send items to an endpoint, in turn and again from the first; with `labels`, compare the answers with them.

    Raises `BenchError` if nothing could be reached at all. An interrupt (Ctrl-C) ends the processes too.
    """
    target = HttpTarget(
        url=endpoint.url,
        requests=endpoint.requests(items),
        list_length=endpoint.list_length,
        error_mark=endpoint.error_mark,
        timeout_s=load.timeout_s,
        max_connections=load.max_connections if load.is_open else load.clients,
        keeps_bodies=keeps_bodies or labels is not None,
    )
    measured = run_target(target, load, on_progress=on_progress)
    is_away = all(reason.startswith(NO_CONNECTION) for reason in measured.errors)
    if is_away and measured.errors and not measured.answered:
        raise BenchError(f"{endpoint.url}: {next(iter(measured.errors))}")
    if labels is not None:
        measured = replace(measured, accuracy=_accuracy(endpoint, labels, measured))
    return measured


def run_target(
    target: CallTarget,
    load: Load,
    *,
    on_progress: OnProgress = lambda *_: None,
    is_client: bool = True,
    start_timeout_s: float | None = None,
) -> Measured:
    """Put the load on any target. Without `load.processes`, runs again with more while the generator is the limit.

    Raises `BenchError` where the target is not open within `start_timeout_s`.

    Where the target itself runs in the process (`is_client` False), one process is all, and busy is as it should be.
    """
    if not is_client:
        return replace(_run(target, load, 1, on_progress, start_timeout_s), limited=())
    processes, most = load.processes or 1, load.processes or max(1, (os.cpu_count() or 1) // 2)
    while True:
        parts = min(processes, load.clients) if not load.is_open else processes
        measured = _run(target, load, parts, on_progress, start_timeout_s)
        if processes >= most or not measured.limited:
            return measured
        processes = min(2 * processes, most)


async def measure_here(call: Call, load: Load) -> Measured:
    """Put a closed loop on a call in this process and event loop. The last answers are waited for, and count."""
    samples, stop = Samples(), asyncio.Event()
    began_s = time.perf_counter()
    timer = asyncio.get_running_loop().call_later(load.seconds, stop.set)
    await closed_loop(call, itertools.count(), load.clients, samples, stop)
    timer.cancel()
    result = PartResult(*samples.columns(), cpu_share=0.0)
    return measured_of([result], load, begin_s=began_s, end_s=time.perf_counter())


def _run(
    target: CallTarget, load: Load, processes: int, on_progress: OnProgress, start_timeout_s: float | None
) -> Measured:
    with spawned(run_part.__module__, run_part.__name__, processes) as pipes:
        for place, pipe in enumerate(pipes):
            pipe.send(Part(target, load, place, processes))
        for pipe in pipes:
            first_received(pipe, "the target", start_timeout_s)  # it is ready
        began_s = time.perf_counter()  # before the word go: on a busy machine, all may be answered by the next line
        for pipe in pipes:
            pipe.send(GO)
        results, stopped_s, was_steady = _results(pipes, load, began_s, on_progress)
    warm_s = 0.0 if load.requests is not None else load.warm_up_s
    return replace(measured_of(results, load, begin_s=began_s + warm_s, end_s=stopped_s), was_steady=was_steady)


def _results(
    pipes: Sequence[Connection], load: Load, began_s: float, on_progress: OnProgress
) -> tuple[list[PartResult], float, bool]:
    """What all processes measured, when they were told to stop or ended, and whether because all was steady."""
    results: list[PartResult] = []
    progress = dict.fromkeys(pipes, (0, 0))
    open_pipes = list(pipes)
    longest_s = load.warm_up_s + load.seconds if load.requests is None else None
    stopped_s = None
    was_steady = False
    timeline: list[tuple[float, int]] = []
    while open_pipes:
        for pipe in wait(open_pipes, timeout=0.05):
            message = received(pipe)  # type: ignore[arg-type]  # all of them are connections
            if isinstance(message, PartResult):
                results.append(message)
                open_pipes.remove(pipe)  # type: ignore[arg-type]
            else:
                progress[pipe] = message  # type: ignore[index]
        elapsed_s = time.perf_counter() - began_s
        answered, failed = (sum(column) for column in zip(*progress.values(), strict=True))
        if stopped_s is None:
            timeline.append((elapsed_s, answered))
            is_over = longest_s is not None and elapsed_s >= longest_s
            was_steady = load.until_steady and is_steady(timeline, load.warm_up_s)
            if is_over or was_steady:
                stopped_s = time.perf_counter()
                for pipe in open_pipes:
                    with suppress(BrokenPipeError):
                        pipe.send(STOP)
            on_progress(elapsed_s, answered, failed)  # it may take its time, so after the word stop
        elif time.perf_counter() > stopped_s + 2 * load.timeout_s + END_S:
            raise BenchError(f"the last requests did not end within {2 * load.timeout_s + END_S:g} s")
    return results, stopped_s if stopped_s is not None else time.perf_counter(), was_steady


def is_steady(timeline: Sequence[tuple[float, int]], warm_up_s: float) -> bool:
    """Whether the rate in each half of the last six seconds is the same within 2 %, and varies no more in each."""
    now_s = timeline[-1][0]
    edges = now_s - STEADY_WINDOW_S * np.arange(STEADY_WINDOWS, -1, -1)
    if edges[0] < warm_up_s:
        return False
    times_s, counts = np.array(timeline, dtype=float).T
    rates = np.diff(np.interp(edges, times_s, counts))
    mean = rates.mean()
    half = STEADY_WINDOWS // 2
    drift = abs(rates[:half].mean() - rates[half:].mean())
    return bool(mean and drift < STEADY_WITHIN * mean and rates.std() / STEADY_WINDOWS**0.5 < STEADY_WITHIN * mean)


def _accuracy(endpoint: Endpoint, labels: Sequence[str], measured: Measured) -> float:
    """The share of items in successful answers whose label is the expected one, whatever its case."""
    right = total = 0
    answers = Counter((index, body) for index, _, body in measured.kept)
    for (index, body), times in answers.items():
        expected = endpoint.items_of(labels, index)
        found = endpoint.labels(body)
        total += times * len(expected)
        right += times * sum(
            label is not None and label.casefold() == other.casefold()
            for label, other in zip(found, expected, strict=False)
        )
    return right / total if total else float("nan")
