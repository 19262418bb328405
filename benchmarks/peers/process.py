"""A server in processes of its own: started until it answers, measured, and killed."""

import contextlib
import http.client
import json
import os
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from modalkit.benchmarks.bench.targets import process
from modalkit.benchmarks.load import Endpoint
from modalkit.benchmarks.peers.contenders import Contender
from modalkit.benchmarks.peers.environments import ENVIRONMENTS
from modalkit.benchmarks.peers.settings import Settings
from modalkit.benchmarks.redis_server import free_port

START_TIMEOUT_S = 90
POLL_S = 0.02
MARK = "PEER_RUN"
"""A variable by which all processes of a server are found, whoever started them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that answers."""

    contender: Contender
    settings: Settings
    endpoint: Endpoint
    started_in_s: float
    """Seconds from its start to its first answer."""
    mark: str

    def memory_mib(self) -> float:
        """The resident memory of all its processes."""
        page_mib = os.sysconf("SC_PAGE_SIZE") / 2**20
        pages = 0
        for pid in processes_of(self.mark):
            with contextlib.suppress(OSError):  # it has just ended
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * page_mib

    def kill(self) -> None:
        """Kill all its processes, as the out-of-memory killer does."""
        kill_all(self.mark)


@contextmanager
def serving(contender: Contender, settings: Settings, folder: Path | None = None) -> Iterator[Server]:
    """A server that answers, in `folder` or a temporary one; it is killed at the end. Raises `BenchError`."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = replace(settings, port=free_port())
        contender.prepare(settings, folder)
        mark = f"{contender.name}-{settings.port}-{os.getpid()}"
        endpoint = contender.endpoint(settings)

        def is_ready(_: str) -> bool:
            return ask(endpoint.url, endpoint.content([{"text": "Is it ready?"}]))[0] == http.HTTPStatus.OK

        started_s = time.perf_counter()
        environment = _environment(contender, settings, mark, folder)
        command = contender.command(settings)
        stack.callback(kill_all, mark)
        stack.enter_context(process(command, environment, is_ready, folder, stop_s=0, timeout_s=START_TIMEOUT_S))
        started_in_s = time.perf_counter() - started_s
        try:
            yield Server(
                contender=contender, settings=settings, endpoint=endpoint, started_in_s=started_in_s, mark=mark
            )
        finally:
            kill_all(mark)  # while its descendants can be told by their parents


def _environment(contender: Contender, settings: Settings, mark: str, folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MODALKIT_"))}
    # One cache, so that the engine that modalkit chooses is that of all; and no files of theirs elsewhere.
    folders = {"XDG_CACHE_HOME": str(ENVIRONMENTS.absolute() / "cache"), "TMPDIR": str(folder)}
    return {**inherited, **folders, **settings.to_variable(), **(contender.variables or {}), MARK: mark}


def ask(url: str, body: bytes | None, method: str = "POST") -> tuple[int, bytes]:
    """Send one request; returns the status, 0 without an answer, and the body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def get_json(url: str) -> object:
    """The answer to a GET request; None for an answer that is no JSON, or none at all."""
    try:
        return json.loads(ask(url, None, "GET")[1])
    except ValueError:
        return None


def processes_of(mark: str) -> list[int]:
    """The processes that were started with this mark, and their descendants, which may have lost it."""
    wanted = f"{MARK}={mark}".encode()
    marked, children = set(), defaultdict(set)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z":
                    continue
                children[int(parent)].add(int(folder.name))
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    marked.add(int(folder.name))
    waiting = list(marked)
    while waiting:
        new = children[waiting.pop()] - marked
        marked |= new
        waiting += new
    return sorted(marked)


def kill_all(mark: str) -> None:
    """Kill the processes with this mark, and those that they start meanwhile, and wait until there are none."""
    while found := processes_of(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
