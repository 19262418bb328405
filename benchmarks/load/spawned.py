"""Processes of our own code, each with a pipe. Unlike those of multiprocessing they do not import the main program."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from modalkit.benchmarks.load.plan import BenchError
from modalkit.service.errors import ServiceError

_RUN = """
import sys
sys.path.append("")  # at the end, as the command line has it
from modalkit.benchmarks.load.spawned import run
run(*sys.argv[1:])
"""
FILES_WITHOUT_LIMIT = 10_240
"""Open files of a process where the system names no limit: macOS refuses to be asked for more than this without one."""


@contextmanager
def spawned(module: str, function: str, count: int = 1) -> Iterator[list[Connection]]:
    """So many processes that call ``module.function`` with their end of a pipe; ours are the value.

    They may open as many files as the system allows.

    The processes are killed at the end of the block. One that ends before closes its pipe, so that reading raises
    `EOFError`.
    """
    pipes: list[Connection] = []
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            ours, theirs = Pipe()
            command = [sys.executable, "-P", "-c", _RUN, module, function, str(theirs.fileno())]
            running.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
            theirs.close()
            pipes.append(ours)
        yield pipes
    finally:
        for process in running:
            process.kill()
            process.wait()
        for pipe in pipes:
            pipe.close()


def run(module: str, function: str, pipe: str) -> None:
    """Call the function, in a process of `spawned`, with the end of the pipe that has this file descriptor."""
    raise_open_files()
    getattr(import_module(module), function)(Connection(int(pipe)))


def raise_open_files() -> None:
    """Let this process open as many files as the system allows; each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = max(soft, FILES_WITHOUT_LIMIT) if hard == resource.RLIM_INFINITY else hard
    with suppress(OSError, ValueError):  # where the system has a lower limit, too
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def first_received(pipe: Connection, what: str, timeout_s: float | None) -> Any:
    """As `received`, and raises `BenchError` where it takes longer; `what` names what the process waits for."""
    if not pipe.poll(timeout_s):
        raise BenchError(f"{what} was not ready within {timeout_s:g} s: look why, or give a longer --start-timeout")
    return received(pipe)


def received(pipe: Connection) -> Any:
    """What the process of this pipe sends. Raises the error that it sends, and `BenchError` where it ends."""
    try:
        message = pipe.recv()
    except EOFError:
        raise BenchError("a process of the load generator ended before its time; there is more above") from None
    if isinstance(message, ServiceError):
        raise message
    if isinstance(message, Exception):
        raise BenchError(str(message)) from message
    return message
