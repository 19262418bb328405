"""A real SQS server (moto's) on a free port of this machine, which can stop and start again with its queues.

The same server speaks AWS's other protocols, SSM's among them.
"""

import socket
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Any, ClassVar

import pytest
from botocore.loaders import JSONFileLoader  # type: ignore[import-untyped]  # ships no types
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import BaseWSGIServer, make_server

REGION = "us-east-1"
_LOAD_FILE = JSONFileLoader.load_file


def forget_aws_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give made-up credentials, and nothing of what this machine may know about AWS."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "made-up")
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL_SSM"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda _, path: _load_file(path))


@cache
def _load_file(path: str) -> Any:
    """The contents of a file of botocore's: each test has a session of its own, which reads them for 0.1 s."""
    return _LOAD_FILE(JSONFileLoader(), path)


class SqsServer:
    """Start it with `start`; `stop` also breaks the connections that are open, as a server that dies does."""

    def __init__(self) -> None:
        self._port = 0
        self._server: BaseWSGIServer | None = None
        self._thread: Thread | None = None
        self.requests: list[str] = []
        """The operations that were asked for, as in ``SendMessageBatch``."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        requests = self.requests

        class Handler(MotoRequestHandler):
            connections: ClassVar[set[socket.socket]] = set()

            def setup(self) -> None:
                super().setup()
                self.connections.add(self.connection)

            def finish(self) -> None:
                self.connections.discard(self.connection)
                super().finish()

            def make_environ(self) -> dict[str, Any]:
                requests.append(self.headers.get("X-Amz-Target", "").rpartition(".")[2])
                return super().make_environ()

            def log_request(self, *args: Any) -> None:
                pass

        app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self._port, app, threaded=True, request_handler=Handler)
        self._port = self._server.server_port
        self._connections = Handler.connections
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # the client was quicker
                connection.shutdown(socket.SHUT_RDWR)
        self._server = self._thread = None
