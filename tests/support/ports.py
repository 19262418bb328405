"""A port for a server that cannot choose one itself."""

import secrets
import socket

OWN_PORTS = range(20_000, 30_000)
"""Below those that systems give to outgoing connections, which other tests open at the same time."""


def free_port() -> int:
    """A port of this machine on which nothing listens. Another call most likely gives another one."""
    while True:
        port = secrets.choice(OWN_PORTS)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
