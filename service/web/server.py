"""The HTTP server: uvicorn, with limits for its connections."""

import asyncio
import logging
import resource
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
MAX_CHECKED = 1000
"""Connections that are looked at in a tenth of a second; where there are more, each is looked at less often."""


class LimitedServer(Server):
    """A server that closes connections which exceed their limits."""

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
    return LimitedServer(
        uvicorn.Config(
            app,
            http=cast("Any", partial(LimitedProtocol, limits=_within_open_files(config))),
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
        )
    )


def _within_open_files(config: ServerConfig) -> ServerConfig:
    """The configuration, with as many connections as the process may have open files.

    Raises the limit of open files where that is needed and allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else max(soft, min(needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return config
    connections = max(1, soft - RESERVED_FILES)
    logger.warning("Only %d connections, as the limit of open files (ulimit -n) allows no more", connections)
    return config.model_copy(update={"max_connections": connections})
