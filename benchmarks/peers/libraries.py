"""The scheduler beside other libraries: its overhead and its batches, in the environment that has them."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modalkit.benchmarks.peers.environments import python_of

LIBRARIES = "libraries"
"""The name of the environment."""


def measure_libraries(*, quick: bool, show: Callable[[str], None]) -> dict[str, Any]:
    """The figures of the overhead study, and of the simulation with each rule. Raises `CalledProcessError`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "overhead.json"
        show("overhead of the scheduler and of other libraries")
        _run("report", "--only", "overhead", "--rounds", "1" if quick else "2", "--json", str(file))
        overhead = json.loads(file.read_text(encoding="utf-8"))["studies"]["overhead"]
    show("quality of the batches")
    batches = json.loads(_run("peers.batches", "--requests", "500" if quick else "4000"))
    return {"overhead": overhead, "batches": batches}


def _run(module: str, *arguments: str) -> str:
    command = [str(python_of(LIBRARIES)), "-m", f"modalkit.benchmarks.{module}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
