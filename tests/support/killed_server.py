"""``modalkit serve`` as a process that is killed and started again, always on the same port and store."""

import os
import re
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.command_line import forked
from tests.support.ports import free_port
from tests.support.processes import ROOT, ForkedPython

START_TIMEOUT_S = 60.0


class KilledServer:
    """Serves the configuration in `folder`; entering the context starts it, leaving stops it gently.

    What it writes to standard error is in `said`, from all its lives.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = ""
        self.starts = 0
        self._folder = folder
        self._environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
        self._process: ForkedPython | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM if exc is None else signal.SIGKILL)

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and wait until it says that it is ready, or until it has died."""
        self.starts += 1
        if self._reader is not None:
            self._reader.join()  # else it tells of the last one's end only now
        self._ready.clear()
        self._process = forked(["serve", "--port", str(self.port)], self._folder, self._environment)
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the server is not ready after {START_TIMEOUT_S:g} s:\n{self.said[-2000:]}")

    def kill(self) -> None:
        """End the process as a crash would."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals) -> None:
        """Send a signal and wait for the end of the process. Does nothing if it does not run."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait()
        if self._reader is not None:
            self._reader.join()
        self._process = None

    def wait(self) -> int:
        """Wait until the process ends by itself; returns its exit code."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.wait()

    def _read(self, process: ForkedPython) -> None:
        for line in process.stderr:
            self.said += line
            if re.match("Ready", line):
                self._ready.set()
        self._ready.set()  # it has died; so that the waiting caller sees it
        process.close_streams()
