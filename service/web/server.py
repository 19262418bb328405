"""The HTTP server: uvicorn, with limits for its connections."""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from modalkit.service.serving import Server
from modalkit.service.settings import ServerConfig
from modalkit.service.web.connections import LimitedProtocol

logger = logging.getLogger(__name__)

RESERVED_FILES = 256
"""Files that a process needs besides its connections."""
FILES_WITHOUT_LIMIT = 10_240
"""Open files that macOS always allows where it names no limit."""
ACCEPT_PAUSE_S = 0.1
"""Seconds until connections are accepted again, after the system did not allow it."""
MAX_CHECKED = 1000
"""Connections that are looked at in a tenth of a second; where there are more, each is looked at less often."""


class TlsListener:
    """Accepts connections by TLS. Those whose handshake is not done count, too, and have a limit of time.

    If it were the event loop that accepts them, as for uvicorn, no connection would count before its handshake is done,
    for which there would be a minute.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Collection[object],
        limits: ServerConfig,
    ) -> None:
        self._listener = listener
        self._context = context
        self._make_protocol = make_protocol
        self._connections = connections
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._accepted = set[socket.socket]()  # those whose handshake has not begun
        self._handshakes = set[asyncio.Task[None]]()
        listener.setblocking(False)
        self._accepting = self._loop.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:
                logger.warning("Connections cannot be accepted: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._connections) + len(self._handshakes) >= self._limits.max_connections:
                connection.close()
            else:
                self._accepted.add(connection)
                handshake = self._loop.create_task(self._shake_hands(connection))
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)
            await asyncio.sleep(0)  # `sock_accept` does not wait where another one is there already

    async def _shake_hands(self, connection: socket.socket) -> None:
        self._accepted.discard(connection)
        try:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.header_timeout_seconds,
            )
        except OSError as error:  # also those of TLS, and of the time
            logger.debug("A TLS handshake failed: %s", error)

    def close(self) -> None:
        """Accept no more, and end the handshakes; for uvicorn, as the next method."""
        for task in (self._accepting, *self._handshakes):
            task.cancel()
        for connection in self._accepted:
            connection.close()  # a task that is cancelled before it began does not

    async def wait_closed(self) -> None:
        """Wait until no more is accepted."""
        await asyncio.wait([self._accepting, *self._handshakes])


class LimitedServer(Server):
    """A server that closes connections which exceed their limits."""

    def __init__(self, config: uvicorn.Config, limits: ServerConfig) -> None:
        super().__init__(config)
        self._limits = limits

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        config, context = self.config, self.config.ssl
        await super().startup(sockets if context is None else [])
        if context is None or not self.started:
            return

        def make_protocol() -> asyncio.Protocol:
            make = cast("Any", config.http_protocol_class)
            protocol: asyncio.Protocol = make(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return protocol

        for listener in sockets or ():
            accepting = TlsListener(listener, context, make_protocol, self.server_state.connections, self._limits)
            self.servers.append(cast("asyncio.Server", accepting))

    async def on_tick(self, counter: int) -> bool:
        """Look at connections, besides what uvicorn does ten times a second."""
        now = asyncio.get_running_loop().time()
        connections = list(self.server_state.connections)
        parts = 1 + len(connections) // MAX_CHECKED
        for connection in connections[counter % parts :: parts]:
            cast("LimitedProtocol", connection).check(now)
        return await super().on_tick(counter)


def server_of(app: ASGIApp, config: ServerConfig, *, access_log: bool) -> LimitedServer:
    """The server of an application; it logs by the handlers that there are.

    It reads the files of the certificate when it starts, and raises the limit of open files where it has to.
    """
    limits = _within_open_files(config)
    return LimitedServer(
        uvicorn.Config(
            app,
            http=cast("Any", partial(LimitedProtocol, limits=limits)),
            ws="none",
            interface="asgi3",
            log_config=None,
            access_log=access_log,
            timeout_graceful_shutdown=cast("int", config.grace_seconds),  # uvicorn passes it to asyncio as it is
            root_path=config.root_path,
            proxy_headers=bool(config.trusted_proxies),
            forwarded_allow_ips=config.trusted_proxies,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            ssl_keyfile_password=None
            if config.tls_key_password is None
            else config.tls_key_password.get_secret_value(),
        ),
        limits,
    )


def _within_open_files(config: ServerConfig) -> ServerConfig:
    """The configuration, with as many connections as the process may have open files.

    Raises the limit of open files where that is needed and allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else max(soft, min(needed, hard))
        for files in (allowed, max(soft, FILES_WITHOUT_LIMIT)):
            with suppress(ValueError):  # macOS names no limit, and has one
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
                soft = files
                break
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return config
    connections = max(1, soft - RESERVED_FILES)
    logger.warning("Only %d connections, as the limit of open files (ulimit -n) allows no more", connections)
    return config.model_copy(update={"max_connections": connections})
