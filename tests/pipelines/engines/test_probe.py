"""A conversion is a process beside the service: neither its signals nor its connections are the service's own."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from modalkit.pipelines import EngineSettings, load_engine
from modalkit.pipelines.engines import measuring, probe
from modalkit.pipelines.engines.probe import Conversion
from modalkit.pipelines.engines.settings import Candidate
from tests.pipelines.engines.conftest import Batch

PROGRAM = """
import sys
from pathlib import Path

import torch

from modalkit.pipelines.engines import probe
from modalkit.pipelines.engines.settings import Candidate

probe.convert = lambda *_: sys.stdin.read()
batch = {"input": torch.zeros(2, 3)}
conversion = probe.Conversion([Candidate("onnx", "float32")], torch.nn.Linear(3, 3), [batch], Path(sys.argv[1]))
conversion.wait(0)
print("the end")
"""


@contextlib.contextmanager
def waiting(
    module: nn.Module, batches: list[Batch], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BaseProcess]:
    """The process of a conversion that waits for a signal; it is ended at the end."""
    ready, started = os.pipe()

    def wait_for_a_signal(*_: Any) -> None:
        os.write(started, b"x")
        signal.pause()

    monkeypatch.setattr(probe, "convert", wait_for_a_signal)
    others = multiprocessing.active_children()
    Conversion([Candidate("onnx", "float32")], module, batches, folder)
    (process,) = set(multiprocessing.active_children()) - set(others)
    os.read(ready, 1)
    try:
        yield process
    finally:
        process.kill()
        process.join()
        os.close(ready)
        os.close(started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_conversion_ends_it_and_is_none_to_the_service(
    module: nn.Module, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Ctrl-C is sent to both, and a second signal stops the service at once. Event loops get signals by a socket."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        earlier = signal.signal(number, lambda *_: None)
        earlier_fd = signal.set_wakeup_fd(writer.fileno())
        try:
            with waiting(module, batches, tmp_path / "onnx", monkeypatch) as process:
                os.kill(process.pid or 0, number)
                process.join()
                assert process.exitcode == -number
        finally:
            signal.set_wakeup_fd(earlier_fd)
            signal.signal(number, earlier)
        with pytest.raises(BlockingIOError):
            reader.recv(1)


def test_a_conversion_keeps_no_connection_and_no_port_of_the_service(
    module: nn.Module, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        client = socket.create_connection(address)
        connection, _ = listener.accept()
        with client, connection, waiting(module, batches, tmp_path / "onnx", monkeypatch):
            connection.close()
            listener.close()
            client.settimeout(20)
            assert client.recv(1) == b""
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)


def test_a_program_ends_while_a_conversion_pauses(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "onnx")],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


def test_conversions_go_on_after_a_start_that_failed(
    module: nn.Module, batches: list[Batch], settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are stopped while the engines race, and end here once they can read."""
    reader, writer = os.pipe()
    others = multiprocessing.active_children()

    def fail(*_: object) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(probe, "convert", lambda *_: os.read(reader, 1))
    monkeypatch.setattr(measuring.Race, "run", fail)
    with pytest.raises(ValueError, match="no such layer"):
        load_engine(module, batches, settings.model_copy(update={"measure_seconds": 0.001}))
    conversions = set(multiprocessing.active_children()) - set(others)
    assert conversions
    os.write(writer, b"x" * len(conversions))
    for process in conversions:
        process.join(60)
        assert process.exitcode is not None
    os.close(reader)
    os.close(writer)
