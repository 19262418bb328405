"""A server is found with all its processes, measured and killed; one that does not start tells why."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modalkit.benchmarks.load import BenchError
from modalkit.benchmarks.peers.contenders import Contender
from modalkit.benchmarks.peers.process import ask, processes_of, serving
from modalkit.benchmarks.peers.settings import Settings

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"NOTHING": "inherited"})

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["PEER_SETTINGS"].encode())

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def contender_of(command: Callable[[Settings], list[str]]) -> Contender:
    return Contender(
        name="fake", title="Fake", package="none", documented=Settings(), source="this test", command=command
    )


def test_a_server_is_started_with_its_settings_and_killed_with_its_children(tmp_path: Path) -> None:
    fake = contender_of(lambda settings: [sys.executable, "-c", SERVER, str(settings.port)])
    with serving(fake, Settings(batch=7), tmp_path) as server:
        assert Settings.from_text(ask(server.endpoint.url, b"{}")[1].decode()) == server.settings
        assert server.settings.batch == 7
        assert server.started_in_s > 0
        assert len(processes_of(server.mark)) == 2  # the child has lost the mark
        assert server.memory_mib() > 5
    assert processes_of(server.mark) == []


def test_a_server_that_ends_tells_what_it_printed(tmp_path: Path) -> None:
    broken = contender_of(lambda _: [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(BenchError, match="no such model"), serving(broken, Settings(), tmp_path):
        pass
