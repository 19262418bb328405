"""A socket that a server listens on."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from modalkit.service.errors import ServiceError


class AddressError(ServiceError):
    """Raised when the service cannot listen on the address it was given."""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen while the context is open; port 0 takes any free one. Raises `AddressError`.

    The protocol is named, as asyncio turns off Nagle's algorithm for such sockets only: it delays answers by 40 ms.
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
                f"cannot listen on {host}:{port}: {error.strerror or error}; stop what uses it, or choose another port"
            ) from error
        yield listener
