"""The command ``modalkit`` in a folder with a configuration, in processes of its own."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.http_client import NO_TLS
from tests.support.processes import ForkedPython

CONFIGURATION = """
app_settings:
  async_config: {store_path: jobs.db}
model_settings:
  model_entries:
    lengths: {pipeline: "tests.support.length_model:LengthPipeline"}
"""

MODALKIT = ["-P", "-c", "from modalkit.service.cli import main; main()"]
"""The arguments of ``python`` that make it the command."""

Modalkit = Callable[..., subprocess.CompletedProcess[str]]
Process = ForkedPython | subprocess.Popen[str]


def started(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """The command in an interpreter of its own, as a user starts it, with a pipe for its standard error."""
    return subprocess.Popen(
        [sys.executable, *MODALKIT, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def forked(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> ForkedPython:
    """The command, forked from a process that has imported it already."""
    return ForkedPython([*MODALKIT, *arguments], cwd=folder, env=environment)


@contextmanager
def serving(
    folder: Path, environment: Mapping[str, str], start: Callable[..., Process] = forked
) -> Iterator[tuple[Process, httpx.Client]]:
    """``modalkit serve`` once it is ready, and a client for it; it is killed at the end."""
    with start(["serve", "--port", "0"], folder, environment) as process:
        try:
            with httpx.Client(base_url=_address(process), timeout=60, verify=NO_TLS) as client:
                yield process, client
        finally:
            process.kill()


def _address(process: Process) -> str:
    """Where it serves; waits until it says that it is ready."""
    assert process.stderr is not None
    said = ""
    while not re.search(r"^Ready", said, re.MULTILINE):
        line = process.stderr.readline()
        assert line, said
        said += line
    address = re.search(r"http://[\d.:]+\d", said)
    assert address, said
    return address.group()
