"""How a process serves HTTP for long: its socket, its server, and Python's garbage collector."""

import ctypes
import errno
import gc
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvicorn

from modalkit.service.errors import ServiceError

BACKLOG = 2048
GC_THRESHOLD = 10_000
SWITCH_INTERVAL_S = 0.001
"""A fifth of Python's default."""
FIRST_INHERITED = 3
"""The file descriptor of the first socket from systemd (sd_listen_fds)."""


class AddressError(ServiceError):
    """Raised when the service cannot listen on the address it was given."""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen while the context is open; port 0 takes any free one. Raises `AddressError`.

    The socket names its protocol: asyncio turns off Nagle's algorithm, which delays answers by 40 ms, for such sockets
    only.
    """
    with ExitStack() as opened:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except (OSError, UnicodeError) as error:  # the latter for a name with an empty or a long part
            problem = getattr(error, "strerror", None) or error
            raise AddressError(f"cannot listen on {host}:{port}: {problem}; {_remedy(error)}") from error
        yield listener


@contextmanager
def listening_on_path(path: Path) -> Iterator[socket.socket]:
    """Listen on a Unix socket, which all users may connect to, while the context is open. Raises `AddressError`.

    A socket that an earlier process has left there is replaced.
    """
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            if path.is_socket() and listener.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
            listener.bind(str(path))
            opened.callback(path.unlink, missing_ok=True)
            path.chmod(0o666)
            listener.listen(BACKLOG)
        except OSError as error:
            remedy = (
                "give a path that does not exist, in a folder that does and is yours, of about 100 characters at most"
            )
            raise AddressError(f"cannot listen on {path}: {error.strerror or error}; {remedy}") from error
        yield listener


def inherited_listeners() -> list[socket.socket]:
    """The sockets that systemd, or what follows its protocol, has opened for this process; it may be asked once."""
    process, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not count.isdigit():
        return []
    listeners = [socket.socket(fileno=FIRST_INHERITED + number) for number in range(int(count))]
    for listener in listeners:
        os.set_inheritable(listener.fileno(), False)
    return listeners


def _remedy(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
        return "give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "choose a port above 1023, or run it with the right to this one"
    return "stop what uses it, or choose another port"


class Server(uvicorn.Server):
    """A server that leaves signals to its owner, which has more to stop than HTTP."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's handlers of signals as they are."""
        yield


def tune_interpreter() -> None:
    """Let Python's threads take turns sooner, and garbage collection skip the objects made at start and run less often.

    Collection took a third of the time of a job. While the event loop is busy, a thread that runs batches or stores
    jobs waits for the interpreter each time that it needs it, for up to `SWITCH_INTERVAL_S`, and callers wait for it.
    What the start has freed is given back to the system; glibc would keep it, 50 MiB with the bundled model.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
