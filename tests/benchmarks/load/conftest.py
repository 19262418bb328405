from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, Event, Thread

import pytest


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says."""

    protocol_version = "HTTP/1.1"
    hanging = Event()
    together = Barrier(5)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match self.path:
            case "/hang":
                self.hanging.wait(20)
            case "/together":  # answers none before five are under way
                self.together.wait(20)
                self._answer(200)
            case "/cut":
                self.close_connection = True
            case "/rubbish":
                self.wfile.write(b"this is not HTTP\r\n\r\n")
            case "/chunked":
                self._answer(200, chunks=[b'{"label":', b' "yes"}'])
            case "/close":
                self._answer(200, b"{}", close=True)
            case "/echo" | "/sync/predict":
                self._answer(200, body)
            case path:
                self._answer(int(path[1:]))

    def _answer(
        self, status: int, body: bytes = b"", *, chunks: list[bytes] | None = None, close: bool = False
    ) -> None:
        self.send_response(status)
        if close:
            self.send_header("Connection", "close")
        if chunks is None:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the standard library
        pass


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A server whose answers depend on the path: a status, or what may go wrong."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = True
        thread = Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}"
        Handler.hanging.set()
        http_server.shutdown()
        thread.join()
