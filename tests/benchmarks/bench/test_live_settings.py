"""A server whose settings are changed while it runs."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import ClassVar

import pytest

from modalkit.benchmarks.bench.targets import UrlTarget
from modalkit.benchmarks.load import BenchError


class Stubborn(BaseHTTPRequestHandler):
    """A server whose settings can be changed once."""

    changes: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        model = {"name": "lengths", "batch_config": {"max_batch_size": 32}}
        self._answer(200, [model] if self.path == "/admin/models" else model)

    def do_PATCH(self) -> None:
        self.changes.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200 if len(self.changes) == 1 else 503, {})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the standard library
        pass


@pytest.fixture
def stubborn() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Stubborn) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_settings_that_cannot_be_changed_back_are_told(stubborn: str) -> None:
    match = r"still has the settings of the sweep.*HTTP 503.*set max_batch_size 32 by PATCH /admin/models/lengths"
    with pytest.raises(BenchError, match=match), UrlTarget(stubborn, {}).started({"max_batch_size": "1"}):
        pass
    assert [json.loads(change) for change in Stubborn.changes] == [{"max_batch_size": "1"}, {"max_batch_size": 32}]
