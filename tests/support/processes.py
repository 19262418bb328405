"""Python programs in processes of their own, as `subprocess` starts them, but forked from one that is there already.

That one has imported our packages and what they need, so a start takes milliseconds instead of a second or two. What a
fork does not show (the imports, the interpreter's options, its end) is for `subprocess`: each command has a test that
starts it so.
"""

import builtins
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Self
from unittest import mock

ROOT = Path(__file__).parents[2]
PRELOADED = [
    "modalkit.service.cli",
    "modalkit.service.on_modal.service",
    "modalkit.pipelines.sentiment",
    "tests.support.length_model",
    "uvloop",
]


@cache
def _context() -> ForkServerContext:
    """What makes processes; the one they are forked from is started with nothing of the calling test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "MODALKIT_"))}
    with chdir(ROOT), mock.patch.dict(os.environ, kept | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}, clear=True):
        multiprocessing.forkserver.ensure_running()
    return context


class ForkedPython:
    """``python ARGUMENTS`` in a folder and an environment, with pipes for its streams; leaving the context kills it.

    `arguments` are ``["-c", program]``, ``["-m", module]`` or ``[file]``, and more for the program. Methods are named
    as those of `subprocess.Popen`.
    """

    def __init__(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        context = _context()
        its_stdin, stdin = context.Pipe(duplex=False)
        stdout, its_stdout = context.Pipe(duplex=False)
        stderr, its_stderr = context.Pipe(duplex=False)
        its_streams = [its_stdin, its_stdout, its_stderr]
        self.stdin, self.stdout, self.stderr = _file(stdin, "w"), _file(stdout, "r"), _file(stderr, "r")
        self._process = context.Process(target=_interpret, args=(its_streams, [*arguments], str(cwd), dict(env)))
        self._process.start()
        for stream in its_streams:
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()
        self.close_streams()

    def close_streams(self) -> None:
        """Close our ends of its streams."""
        for stream in (self.stdin, self.stdout, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def communicate(self, stdin: str = "", timeout: float | None = None) -> tuple[str, str]:
        """Give it all of its input, and wait for its end; returns what it wrote to its output and error streams."""
        with ThreadPoolExecutor(2) as threads:
            said = [threads.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                with suppress(BrokenPipeError):
                    self.stdin.write(stdin)
                    self.stdin.close()
                self.wait(timeout)
            except BaseException:
                self.kill()
                raise
            return said[0].result(), said[1].result()


def run(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    input: str = "",  # noqa: A002  # as `subprocess.run` calls it
    check: bool = False,
    timeout: float = 100,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS``, as `subprocess.run` does with its output captured."""
    with ForkedPython(arguments, cwd=cwd, env=env) as process:
        stdout, stderr = process.communicate(input, timeout)
        done = subprocess.CompletedProcess([*arguments], process.wait(), stdout, stderr)
    if check:
        done.check_returncode()
    return done


def _file(connection: Connection, mode: str) -> IO[str]:
    with connection:
        return os.fdopen(os.dup(connection.fileno()), mode, encoding="utf-8", errors="surrogateescape")


def _interpret(streams: list[Connection], arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """Do what the interpreter does at its start, as far as a forked process can."""
    for number, stream in enumerate(streams):
        with stream:
            os.dup2(stream.fileno(), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests run in the background of a script
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for option in filter(None, env.get("PYTHONWARNINGS", "").split(",")):
        action, _, category = option.partition("::")  # as in "error" or "ignore::DeprecationWarning"
        warnings.simplefilter(action, getattr(builtins, category or "Warning"))  # type: ignore[arg-type]  # an action
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in ["", *sys.path]]
    if arguments[0] == "-P":  # the folder of the program holds no modules
        arguments = arguments[1:]
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent) if arguments[0][0] != "-" else cwd)
    match arguments:
        case ["-c", program, *rest]:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(main))  # noqa: S102  # this is what -c does
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *rest]:
            sys.argv = [file, *rest]
            runpy.run_path(file, run_name="__main__")
