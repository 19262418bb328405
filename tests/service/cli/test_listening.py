"""What ``modalkit serve`` listens on: TLS, a Unix socket, a socket from systemd; and what it believes of a proxy."""

import datetime
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from tests.support.command_line import MODALKIT, Modalkit, Process, forked, serving
from tests.support.http_client import NO_TLS

PASSWORD = "of the key"
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""
HANGING = """
import threading
from tests.support.length_model import LengthPipeline

class Hanging(LengthPipeline):
    def postprocess(self, input_list, raw_output):
        if "hang" in raw_output["texts"]:
            threading.Event().wait()
        return super().postprocess(input_list, raw_output)
"""


def said_until_ready(process: Process) -> str:
    assert process.stderr is not None
    said = ""
    while not re.search(r"^Ready", said, re.MULTILINE):
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


@pytest.fixture
def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1; its key is in key.pem beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(alternative, critical=False)
        .sign(key, SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(Encoding.PEM))
    encryption = BestAvailableEncryption(PASSWORD.encode())
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return folder / "certificate.pem"


@contextmanager
def serving_by_tls(folder: Path, environment: dict[str, str], **settings: str) -> Iterator[int]:
    """The port of a service that has the `certificate`."""
    settings["TLS_KEY_PASSWORD"] = PASSWORD
    variables = {f"MODALKIT_APP_SETTINGS__SERVER_CONFIG__{name}": value for name, value in settings.items()}
    options = ["--port", "0", "--tls-certificate", "certificate.pem", "--tls-key", "key.pem"]
    with forked(["serve", *options], folder, environment | variables) as process:
        found = re.search(r"https://127.0.0.1:(\d+)", said_until_ready(process))
        assert found
        yield int(found[1])


def assert_serves_by_tls(port: int, certificate: Path) -> None:
    trusted = ssl.create_default_context(cafile=certificate)
    answer = httpx.post(f"https://localhost:{port}/sync/predict", json={"text": "four"}, verify=trusted)
    assert answer.json()["length"] == 4


def assert_is_closed(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def test_it_serves_by_tls(folder: Path, environment: dict[str, str], certificate: Path) -> None:
    with serving_by_tls(folder, environment) as port:
        assert_serves_by_tls(port, certificate)


def test_what_is_no_tls_is_closed_and_so_are_handshakes_that_do_not_go_on(
    folder: Path, environment: dict[str, str], certificate: Path
) -> None:
    """After the time for headers: the event loop alone would wait for a minute."""
    with serving_by_tls(folder, environment, HEADER_TIMEOUT_SECONDS="0.3") as port:
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"):
            with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
                connection.sendall(sent)
                assert_is_closed(connection)
        assert_serves_by_tls(port, certificate)


def test_handshakes_count_as_connections(folder: Path, environment: dict[str, str], certificate: Path) -> None:
    with serving_by_tls(folder, environment, HEADER_TIMEOUT_SECONDS="600", MAX_CONNECTIONS="3") as port:
        with ExitStack() as opened:
            for _ in range(3):
                opened.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
            with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
                assert_is_closed(connection)
        while True:
            with suppress(httpx.TransportError):  # the server has not noticed yet that they were closed
                assert_serves_by_tls(port, certificate)
                break


@pytest.mark.parametrize("name", ["certificate.pem", "missing.pem"])
def test_a_certificate_that_cannot_be_used_is_one_message(modalkit: Modalkit, certificate: Path, name: str) -> None:
    certificate.write_text("rubbish")
    done = modalkit("serve", "--port", "0", "--tls-certificate", name)
    assert done.returncode == 2
    assert f"app_settings.server_config.tls_certificate: {name}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_without_a_certificate_is_refused(modalkit: Modalkit) -> None:
    done = modalkit("serve", "--port", "0", "--tls-key", "key.pem")
    assert done.returncode == 2
    assert "tls_key: is of no use without tls_certificate" in done.stderr


def test_it_serves_on_a_unix_socket_which_it_removes(folder: Path, environment: dict[str, str]) -> None:
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(str(path))
    with forked(["serve", "--unix-socket", "a.sock"], folder, environment) as process:
        assert "on unix:a.sock" in said_until_ready(process)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.post("/sync/predict", json={"text": "four"}).json()["length"] == 4
            assert client.get("/health/ready").status_code == 200
        other = forked(["serve", "--unix-socket", "a.sock"], folder, environment)
        with other:
            other.wait(timeout=60)
            assert "cannot listen on a.sock: Address already in use" in other.stderr.read()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert not path.exists()


def test_it_serves_on_the_socket_that_systemd_has_opened(folder: Path, environment: dict[str, str]) -> None:
    """Systemd passes its sockets from the third file descriptor on, to the process whose id it writes down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(listener.fileno()), sys.executable, *MODALKIT, "serve"],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[listener.fileno()],
        )
        with process:
            try:
                said_until_ready(process)
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                assert httpx.post(f"{url}/sync/predict", json={"text": "four"}, verify=NO_TLS).json()["length"] == 4
            finally:
                process.kill()


def test_the_root_path_is_in_the_documentation_and_in_locations(folder: Path, environment: dict[str, str]) -> None:
    with serving(folder, environment | {"MODALKIT_APP_SETTINGS__SERVER_CONFIG__ROOT_PATH": "/models"}) as (_, client):
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/models"}]
        accepted = client.post("/async/predict", json={"message": {"text": "four"}})
        assert accepted.headers["location"] == f"/models/jobs/{accepted.json()['job_id']}"
        assert client.post("/sync/predict", json={"text": "four"}).json()["length"] == 4


@pytest.mark.parametrize(("proxies", "address"), [("[127.0.0.0/8]", "203.0.113.9"), ("[]", "127.0.0.1")])
def test_the_access_log_has_the_address_from_a_trusted_proxy(
    folder: Path, environment: dict[str, str], proxies: str, address: str
) -> None:
    variables = {
        "MODALKIT_APP_SETTINGS__SERVER_CONFIG__TRUSTED_PROXIES": proxies,
        "MODALKIT_APP_SETTINGS__SERVER_CONFIG__ACCESS_LOG": "true",
    }
    with serving(folder, environment | variables) as (process, client):
        client.get("/health/live", headers={"X-Forwarded-For": "203.0.113.9"})
        assert process.stderr is not None
        line = process.stderr.readline()
        while "GET /health/live" not in line:
            assert line
            line = process.stderr.readline()
        assert address in line


def test_no_access_is_logged_where_that_is_turned_off(folder: Path, environment: dict[str, str]) -> None:
    with forked(["serve", "--port", "0", "--no-access-log", "--log-level", "info"], folder, environment) as process:
        found = re.search(r"http://[\d.:]+\d", said_until_ready(process))
        assert found
        httpx.get(f"{found[0]}/health/live", verify=NO_TLS)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "GET" not in process.stderr.read()


def test_open_requests_may_take_the_grace(folder: Path, environment: dict[str, str]) -> None:
    """A request that hangs ends with the grace, and not with its own limits."""
    (folder / "hanging.py").write_text(HANGING)
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {a: {pipeline: 'hanging:Hanging'}}}")
    with forked(["serve", "--port", "0", "--grace", "0.1"], folder, environment) as process:
        said = said_until_ready(process)
        address = re.search(r"http://127.0.0.1:(\d+)", said)
        assert address
        with (
            socket.create_connection(("127.0.0.1", int(address[1]))) as connection,
            httpx.Client(base_url=address[0], verify=NO_TLS) as client,
        ):
            connection.sendall(b'POST /sync/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n{"text":"hang"}')
            while 'modalkit_running_requests{model="a"} 1.0' not in client.get("/metrics").text:
                pass
            os.kill(process.pid, signal.SIGTERM)
            while connection.recv(2**16):
                pass
