"""A real ``taskiq worker``, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 30.0

# What the tasks in taskiq_tasks.py and their tests have in common: a list in Redis, and a message.
DONE = "done"
HANG = "hang"


class TaskiqWorker:
    """``taskiq COMMAND BROKER OPTIONS``; entering the context starts it, leaving kills it and its children.

    `broker` is as in ``"my_module:broker"``, found from `folder`.
    """

    def __init__(
        self, broker: str, *options: str, folder: Path, env: dict[str, str], log: Path, command: str = "worker"
    ) -> None:
        workers = ["--workers", "1"] if command == "worker" else []
        self._command = [sys.executable, "-m", "taskiq", command, broker, *workers, *options]
        self._folder = folder
        self._env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        self._log = log

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def wait_for_log(self, text: str, count: int = 1) -> None:
        """Wait until the log has `text`, that many times."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (log := self._log.read_text()).count(text) < count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the worker did not say {text!r} {count} times:\n{log[-5000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the worker as an operator would, and wait for it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(START_TIMEOUT_S)

    def kill(self) -> None:
        """End the worker and its children as a crash would."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self._process.wait()
