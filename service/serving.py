"""How a process serves HTTP for long: its socket, its server, and Python's garbage collector."""

import errno
import gc
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvicorn

from modalkit.service.errors import ServiceError

GC_THRESHOLD = 10_000


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
            listener.listen(2048)
        except OSError as error:
            raise AddressError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; {_remedy(error)}"
            ) from error
        yield listener


def _remedy(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
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


def freeze_gc() -> None:
    """Freeze the objects made at start, so that garbage collection skips them, and collect the others less often.

    Collection took a third of the time of a job.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
