"""Processes of our own code, each with a pipe. Unlike those of multiprocessing they do not import the main program."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

_RUN = """
import resource, sys
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
sys.path.append("")  # at the end, as the command line has it
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
with suppress(OSError, ValueError):  # where the system has a lower limit, too
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # each connection is one
module, function, pipe = sys.argv[1:]
getattr(import_module(module), function)(Connection(int(pipe)))
"""


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
