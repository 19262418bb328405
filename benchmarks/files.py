"""A Parquet file through a service, beside the same file in one process: ``python -m modalkit.benchmarks.files``.

The service is killed by ``kill -9`` after a third of the rows, and `modalkit submit` interrupted by Ctrl-C after two
thirds; then it goes on. The results are checked: none is missing, none comes twice, and they are in order. The model
waits half a millisecond for each row, as for a device elsewhere; ``--model bundled`` is the bundled one.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from modalkit.benchmarks.bench.targets import MODALKIT
from modalkit.benchmarks.corpus import mixed_length_texts

PORT = 8439
URL = f"http://127.0.0.1:{PORT}"
POLL_S = 0.1
PIPELINES = {
    "waiting": "modalkit.benchmarks.nothing:WaitingPipeline",
    "bundled": "modalkit.pipelines.sentiment:SentimentPipeline",
}
CONFIGURATION = """
app_settings:
  async_config: {{store_path: jobs.db}}
model_settings:
  model_entries:
    model: {{pipeline: "{pipeline}"}}
"""


@contextmanager
def served(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``modalkit serve`` in `folder`, once it is ready. Raises `RuntimeError` where it ends before."""
    with subprocess.Popen([*MODALKIT, "serve", "--port", str(PORT)], cwd=folder, stderr=subprocess.DEVNULL) as process:
        try:
            while not _is_ready():
                if process.poll() is not None:
                    raise RuntimeError(f"modalkit serve ended with code {process.returncode}")
                time.sleep(POLL_S)
            yield process
        finally:
            process.terminate()


def _is_ready() -> bool:
    try:
        return httpx.get(f"{URL}/health/ready").is_success
    except httpx.TransportError:
        return False


def peak_mib(pid: int) -> float:
    """The most memory that a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def run(folder: Path, *arguments: str) -> float:
    """Run a command to its end; returns the rate that it tells, in rows per second."""
    done = subprocess.run([*MODALKIT, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    found = re.search(r"\((\d+) (?:items|lines)/s\)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(done.stderr)
    return float(found[1])


def written(folder: Path) -> int:
    """How many results an interrupted run has written so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out.jsonl.partial"))


def with_faults(folder: Path, submit: list[str], rows: int) -> tuple[float, float]:
    """Submit a file through a kill and an interruption; returns the peak memory of the command and of the service."""
    with served(folder) as service:
        command = subprocess.Popen([*MODALKIT, *submit], cwd=folder, stderr=subprocess.DEVNULL)
        while written(folder) < rows // 3:
            time.sleep(POLL_S)
        service_mib = peak_mib(service.pid)
        service.kill()
    with served(folder) as service:
        while written(folder) < 2 * rows // 3:
            time.sleep(POLL_S)
        command_mib = peak_mib(command.pid)
        command.send_signal(signal.SIGINT)
        command.wait()
        run(folder, *submit, "--resume")
        return command_mib, max(service_mib, peak_mib(service.pid))


def check(folder: Path, rows: int) -> None:
    """Raise `AssertionError` unless each row has its result, once and in order."""
    with (folder / "out.jsonl").open() as lines:
        found = [json.loads(line) for line in lines]
    ids = [row["id"] for row in found]
    if ids != list(range(rows)) or any(row["status"] != "success" for row in found):
        raise AssertionError(f"{len(ids)} rows, {len(set(ids))} different ones, or not in order, or with errors")


def main(
    rows: Annotated[int, typer.Option(help="How many rows.")] = 100_000,
    model: Annotated[str, typer.Option(help="waiting or bundled.")] = "waiting",
    part: Annotated[str | None, typer.Option(help="rates or faults; both if left out.")] = None,
) -> None:
    """Print the rates, and what a kill and an interruption leave."""
    texts = mixed_length_texts(min(rows, 2000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "modalkit.yaml").write_text(CONFIGURATION.format(pipeline=PIPELINES[model]))
        columns = {"id": range(rows), "review": [texts[row % len(texts)] for row in range(rows)]}
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "in.parquet")
        os.environ["MODALKIT_CONFIG"] = str(folder / "modalkit.yaml")
        file = ["--column", "review", "--keep-columns", "-o", "out.jsonl"]
        submit = ["submit", "in.parquet", "--url", URL, "--wait", "--force", *file]
        if part in (None, "rates"):
            alone = run(folder, "predict", "--input", "in.parquet", *file)
            with served(folder):
                over_http = run(folder, *submit)
            check(folder, rows)
            print(f"{rows} rows: {alone:.0f}/s in one process, {over_http:.0f}/s over HTTP ({over_http / alone:.3f} x)")
        if part in (None, "faults"):
            (folder / "out.jsonl").unlink(missing_ok=True)
            started_s = time.perf_counter()
            command_mib, service_mib = with_faults(folder, submit, rows)
            elapsed_s = time.perf_counter() - started_s
            check(folder, rows)
            print(
                f"{rows} rows through a kill -9 and a Ctrl-C in {elapsed_s:.0f} s: none lost, none "
                f"twice, in order; peak memory {command_mib:.0f} MiB (command), {service_mib:.0f} MiB (service)"
            )


if __name__ == "__main__":
    typer.run(main)
