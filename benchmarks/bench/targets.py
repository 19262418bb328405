"""What is measured: a server at a URL, one that is started here, or a model in a process of the load generator."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import httpx

from modalkit.benchmarks.load import BenchError, Endpoint, OptionError
from modalkit.benchmarks.load.client import direct_client
from modalkit.benchmarks.load.endpoint import Item
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig

Variant = Mapping[str, str]
"""Settings by their name, as ``{"max_batch_size": "8"}``; empty: as they are."""

ENTRY_KEYS = ("engine", "dtype", "max_in_flight", "model_path", "devices")
LIMITS = tuple(name for name in BatchConfig.model_fields if name != "calibration")
SETTINGS = ("device", *ENTRY_KEYS, *(name for name in LIMITS if name not in ENTRY_KEYS))
"""What a variant may set; of a server that runs already, the limits alone."""
MODALKIT = [sys.executable, "-P", "-c", "from modalkit.service.cli import main; main()"]
"""The command ``modalkit`` of this environment."""
SERVE = [*MODALKIT, "serve", "--port", "0"]
STOP_S = 10.0
START_CHECK_S = 0.2
MAX_SHOWN = 500
"""Characters of an answer that a message shows."""
MAX_LOG_LINES = 20
MAX_SAID = 2000
"""Characters of the output of a process that a message shows."""
WITHOUT_KEY = {"MODALKIT_APP_SETTINGS__AUTH_CONFIG__INSECURE": "true"}
"""The variable by which a modalkit server without a key listens on an address that others might reach."""
PLAIN_HTTP = {
    f"MODALKIT_APP_SETTINGS__SERVER_CONFIG__{name}": "null"
    for name in ("UNIX_SOCKET", "TLS_CERTIFICATE", "TLS_KEY", "TLS_KEY_PASSWORD")
}
"""The variables by which ``modalkit serve`` listens on a port without TLS, whatever is configured."""


@dataclass(frozen=True, slots=True)
class Running:
    """A target that takes load."""

    url: str | None
    """Its address; None for a target without HTTP."""
    started_s: float | None = None
    """When its start began, by `time.perf_counter`; None if it ran already."""
    check: Callable[[], object] = lambda: None
    """Raises `BenchError` with its log where it has ended; called until the first answer."""


class Target(Protocol):
    """Something to measure, in several variants one after the other."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...  # a protocol method has no body

    def started(self, variant: Variant) -> AbstractContextManager[Running]:
        """A context in which it runs with these settings."""
        ...  # a protocol method has no body


def variables_of(variant: Variant, model: str) -> dict[str, str]:
    """The variables that give a modalkit server these settings."""
    names = {}
    for key, value in variant.items():
        if key == "device":
            names["MODEL_SETTINGS__COMMON__DEVICE"] = value
        else:  # limits too: those of the model's entry count, where it has some
            level = "" if key in ENTRY_KEYS else "BATCH_CONFIG__"
            names[f"MODEL_SETTINGS__MODEL_ENTRIES__{model}__{level}{key.upper()}"] = value
    return {f"MODALKIT_{name}": value for name, value in names.items()}


@dataclass(frozen=True, slots=True)
class UrlTarget:
    """A server that runs. The settings of a modalkit server are changed while it runs, and changed back."""

    name: str
    headers: Mapping[str, str]
    model: str | None = None

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:
        """Raises `BenchError` where the server cannot be changed."""
        if not variant:
            yield Running(self.name)
            return
        with direct_client(base_url=self.name, headers=self.headers, timeout=60) as client:
            try:
                found = client.get("/admin/models").raise_for_status().json()
                path = f"/admin/models/{quote(self.model or found[0]['name'], safe='/')}"
                before = client.get(path).raise_for_status().json()["batch_config"] or {}
                client.patch(path, json=dict(variant)).raise_for_status()
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                raise BenchError(
                    f"{self.name}: the settings cannot be changed while it runs: {_problem(error)}; a modalkit server "
                    "needs --key for this, and takes keys of batch_config"
                ) from error
            try:
                yield Running(self.name)
            finally:
                old = {key: before[key] for key in variant if key in before}
                try:
                    client.patch(path, json=old).raise_for_status()
                except httpx.HTTPError as error:
                    shown = ", ".join(f"{key} {value}" for key, value in old.items())
                    raise BenchError(
                        f"{self.name} still has the settings of the sweep, because changing them back failed: "
                        f"{_problem(error)}; set {shown} by PATCH {path}"
                    ) from error


@dataclass(frozen=True, slots=True)
class ServeTarget:
    """``modalkit serve`` with the configuration of this folder, started for each variant."""

    model: str
    config: Sequence[Path] = ()
    variables: Mapping[str, str] | None = None
    """Further variables, as for a queue that the benchmark reads."""
    start_timeout_s: float = math.inf
    name: str = "modalkit serve"

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:
        """Raises `BenchError` where it does not start."""
        command = [*SERVE, *(part for path in self.config for part in ("--config", str(path)))]
        with tempfile.TemporaryDirectory() as folder:
            # Its jobs are in a store of its own, which is synchronised as the configured one.
            store = {"MODALKIT_APP_SETTINGS__ASYNC_CONFIG__STORE_PATH": str(Path(folder, "jobs.db"))}
            given = {
                **os.environ, **store, **PLAIN_HTTP, **(self.variables or {}), **variables_of(variant, self.model)
            }  # fmt: skip
            started_s = time.perf_counter()
            with process(command, given, is_serving, name=self.name, timeout_s=self.start_timeout_s) as served:
                if (without := _WITHOUT.search(served.said)) and self.model in without[1].split(", "):
                    raise BenchError(f"{self.name} could not load {self.model}: {served.said[-MAX_SAID:]}")
                yield Running(served.url, started_s, served.check)


_WITHOUT = re.compile(r"^Ready after .*, without (.*) \(see the errors above\)", re.MULTILINE)
_ADDRESS = re.compile(r"(?:^modalkit \S+|running) on (http://[\w.:\[\]]+\d)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Process:
    """A process that is ready."""

    said: str
    """Its output until then."""
    check: Callable[[], object]
    """Raises `BenchError` with its output where it has ended."""

    @property
    def url(self) -> str:
        """The address that it names. Raises `BenchError`."""
        if (found := _ADDRESS.search(self.said)) is None:
            raise BenchError(f"the server named no address: {self.said}")
        return found[1]


@contextmanager
def process(
    command: Sequence[str],
    environment: Mapping[str, str],
    is_ready: Callable[[str], object],
    folder: Path | None = None,
    *,
    name: str | None = None,
    stop_s: float = STOP_S,
    timeout_s: float = math.inf,
) -> Iterator[Process]:
    """A process, once `is_ready` says so, which gets its output. It is stopped gently, and killed `stop_s` later.

    Raises `BenchError` with its output where it ends before, or is not ready in time.
    """
    with tempfile.NamedTemporaryFile() as log:  # a pipe would have to be read all the time
        deadline_s = time.perf_counter() + timeout_s
        running = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
        )

        def said() -> str:
            return Path(log.name).read_text(errors="replace")

        def check() -> None:
            if running.poll() is not None:
                raise BenchError(f"{name or command[0]} ended with code {running.returncode}: {said()[-MAX_SAID:]}")

        try:
            while not is_ready(so_far := said()):
                check()
                if time.perf_counter() > deadline_s:
                    raise BenchError(f"{name or command[0]} was not ready within {timeout_s:g} s: {said()[-MAX_SAID:]}")
                time.sleep(0.02)
            yield Process(so_far, check)
        finally:
            if stop_s:
                running.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    running.wait(stop_s)
            running.kill()
            running.wait()


is_serving = re.compile("^Ready after ", re.MULTILINE).search
"""Whether ``modalkit serve`` with this output is ready."""


@dataclass(frozen=True, slots=True)
class DockerTarget:
    """A docker image, of which a container is started for each variant."""

    name: str
    model: str
    port: int = 8000
    """The port that the container listens on."""
    arguments: Sequence[str] = ()
    """Of ``docker create``, as ``--gpus=all``."""

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:
        """Raises `BenchError` where docker is missing or fails, or the container ends at once.

        A modalkit server in it needs no API key, because its port is published on 127.0.0.1 alone.
        """
        given = WITHOUT_KEY | variables_of(variant, self.model)
        variables = [f"--env={name}={value}" for name, value in given.items()]
        publish = f"--publish=127.0.0.1::{self.port}"
        container = docker("create", publish, *variables, *self.arguments, self.name).split()[-1]

        def check() -> None:
            if docker("inspect", "--format={{.State.Running}}", container).strip() != "true":
                raise BenchError(f"the container of {self.name} ended: {_log('logs', container)}")

        try:
            started_s = time.perf_counter()
            docker("start", container)
            check()
            address = docker("port", container, f"{self.port}/tcp").split()[0]
            yield Running(f"http://{address}", started_s, check)
        finally:
            docker("stop", container)
            docker("rm", "--volumes", container)


@dataclass(frozen=True, slots=True)
class ComposeTarget:
    """A compose file, whose services are started for each variant."""

    name: str
    model: str
    port: int = 8000
    """The port of this machine that a service publishes."""

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:
        """The service that publishes the port gets the variables of the variant. Raises as `DockerTarget` does.

        Who can reach the port is up to the file, so its service asks for a key where it would without `bench`.
        """
        service = self._service()
        with tempfile.NamedTemporaryFile("w", suffix=".json") as further:
            json.dump({"services": {service: {"environment": variables_of(variant, self.model)}}}, further)
            further.flush()
            compose = ("compose", "--file", self.name, "--file", further.name)

            def check() -> None:
                if not docker(*compose, "ps", "--quiet", "--status=running", service).strip():
                    raise BenchError(f"{service} of {self.name} ended: {_log(*compose, 'logs', service)}")

            started_s = time.perf_counter()
            try:
                docker(*compose, "up", "--detach")
            except BenchError:
                with suppress(BenchError):  # what came up
                    docker(*compose, "down")
                raise
            try:
                yield Running(f"http://127.0.0.1:{self.port}", started_s, check)
            finally:
                docker(*compose, "down")

    def _service(self) -> str:
        """The service that publishes the port."""
        services = json.loads(docker("compose", "--file", self.name, "config", "--format=json"))["services"]
        for name, service in services.items():
            if any(str(port.get("published")) == str(self.port) for port in service.get("ports", ())):
                return str(name)
        raise BenchError(f"no service of {self.name} publishes port {self.port}: give --port")


def _log(*command: str) -> str:
    """The end of what a container printed, by the command that shows it."""
    *before, name = command
    return docker(*before, f"--tail={MAX_LOG_LINES}", name, stderr=subprocess.STDOUT).strip()


def docker(*arguments: str, stderr: int = subprocess.PIPE) -> str:
    """What a docker command prints, with its errors where they go to ``STDOUT``.

    Raises `BenchError` with what it says where it fails.
    """
    try:
        done = subprocess.run(
            ["docker", *arguments],  # noqa: S607  # the user's own docker
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise BenchError(
            "there is no program docker: install it, or start the server yourself and give its URL"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        if said.startswith("unknown flag: --file"):
            raise BenchError("docker has no plugin compose here: install it (apt-get install docker-compose-v2)")
        raise BenchError(f"docker {' '.join(arguments)}: {said}")
    return done.stdout


def _problem(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}: {error.response.text[:MAX_SHOWN]}"
    return describe_error(error)


def first_answer_s(
    running: Running, endpoint: Endpoint, items: Sequence[Item], timeout_s: float, *, needs_label: bool = False
) -> float | None:
    """Wait until a request is answered; the seconds since the start began, or None if it ran already.

    Raises `BenchError` where none is answered in time, one is refused, the server ended, or the answer has no label
    though it `needs_label`, with what it says.
    """
    begun_s = time.perf_counter()
    deadline_s = begun_s if running.started_s is None else begun_s + timeout_s
    body = endpoint.content(endpoint.items_of(items, 0))
    headers = {"Content-Type": endpoint.content_type, **endpoint.headers}
    with direct_client() as client:
        while True:
            is_final = False
            left_s = max(START_CHECK_S, begun_s + timeout_s - time.perf_counter())
            try:
                answer = client.post(endpoint.url, content=body, headers=headers, timeout=left_s)
                answer.raise_for_status()
            except httpx.HTTPStatusError as error:
                problem, is_final = _problem(error), error.response.is_client_error
            except httpx.HTTPError as error:
                problem = _problem(error)
                running.check()
            else:
                if needs_label and not any(endpoint.labels(answer.content)):
                    shown = f"{endpoint.url} answers {answer.text[:MAX_SHOWN]}"
                    raise OptionError(f"--answer {endpoint.answer!r} is the path of no label: {shown}")
                return None if running.started_s is None else time.perf_counter() - running.started_s
            if is_final or time.perf_counter() > deadline_s:
                raise BenchError(f"{endpoint.url}: the first request failed: {problem}")
            time.sleep(START_CHECK_S)
