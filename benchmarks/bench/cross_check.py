"""The same load by an independent tool: wrk, or NVIDIA's aiperf in an environment of its own."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from modalkit.benchmarks.bench.results import Cell
from modalkit.benchmarks.load import BenchError, Endpoint, Load, OptionError
from modalkit.benchmarks.load.endpoint import LINES

TOOLS = ("wrk", "aiperf")
AGREEMENT = 0.05
AIPERF = "aiperf>=0.13,<1"
_LATENCY_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
# wrk has one connection for each client, and sends the requests of the list one after the other.
_LUA = """
local bodies = {%s}
local at = 0
wrk.method = "POST"
%s
request = function()
  at = at %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
"""


def wrk_program() -> str:
    """Raises `BenchError` where it is not installed."""
    program = shutil.which("wrk")
    if program is None:
        raise BenchError("there is no program wrk: install it (apt-get install wrk, or brew install wrk)")
    return program


def cross_check(
    tool: str, endpoint: Endpoint, items: Sequence[Any], load: Load, own: Cell, repeats: int = 1
) -> dict[str, Any]:
    """Put the clients of the closed loop `own` on the endpoint by `tool`, and compare the throughput.

    The times are those of `load`, and the figures the means of `repeats` runs. Raises `BenchError` where the tool is
    missing or fails.
    """
    load = replace(load, clients=own.clients or 1)
    run, runs = _wrk if tool == "wrk" else _aiperf, []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(endpoint, items, load, Path(folder)))
    found = {name: fmean(one[name] for one in runs) for name in runs[0]}
    items_per_s = found["requests_per_s"] * endpoint.list_length
    own_figure = own.figures["items_per_s"]
    ratio = items_per_s / own_figure.mean if own_figure.mean else float("inf")
    return {
        "tool": tool,
        "load": str(load),
        "items_per_s": items_per_s,
        "own_items_per_s": own_figure.mean,
        "own_interval": None if own_figure.high is None else own_figure.high - own_figure.mean,
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "ratio": ratio,
        "agrees": abs(ratio - 1) <= AGREEMENT,
    }


def _wrk(endpoint: Endpoint, items: Sequence[Any], load: Load, folder: Path) -> dict[str, float]:
    bodies = _bodies(endpoint, items)
    headers = {"Content-Type": endpoint.content_type, **endpoint.headers}
    script = folder / "load.lua"
    lines = "\n".join(f"wrk.headers[{_lua(name.encode())}] = {_lua(value.encode())}" for name, value in headers.items())
    script.write_text(_LUA % (",".join(map(_lua, bodies)), lines))
    connections = f"-c{load.clients}"
    said = _output(
        [wrk_program(), "-t1", connections, f"-d{max(1, round(load.warm_up_s + load.seconds))}s", "--latency",
         f"--timeout={load.timeout_s:g}s", "-s", str(script), endpoint.url]
    )  # fmt: skip
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    if failed is not None:
        raise BenchError(f"wrk got {failed[1]} answers that were no success:\n{said}")
    return {
        "requests_per_s": float(_found(r"Requests/sec:\s+([\d.]+)", said)[0]),
        **{f"p{share}_ms": _milliseconds(*_found(rf"{share}%\s+([\d.]+)(us|ms|s|m)", said)) for share in (50, 99)},
    }


def _lua(content: bytes) -> str:
    """A string of Lua that is these bytes."""
    plain = range(32, 127)
    text = (chr(byte) if byte in plain and byte not in b'"\\' else f"\\{byte:03d}" for byte in content)
    return f'"{"".join(text)}"'


def _milliseconds(value: str, unit: str) -> float:
    return float(value) * _LATENCY_MS[unit]


def _found(pattern: str, said: str) -> tuple[str, ...]:
    match = re.search(pattern, said)
    if match is None:
        raise BenchError(f"wrk printed no {pattern}:\n{said}")
    return match.groups()


def _aiperf(endpoint: Endpoint, items: Sequence[Any], load: Load, folder: Path) -> dict[str, float]:
    bodies = _bodies(endpoint, items)
    if endpoint.content_type == LINES or not bodies[0].startswith(b"{"):
        raise OptionError("--tool aiperf sends JSON objects: use wrk for lists and streams")
    prompts, artifacts = folder / "prompts.jsonl", folder / "artifacts"
    # It sends texts to language models. Here each text is the body of a request, and the template leaves it as it is.
    lines = (json.dumps({"text": body.decode()}) + "\n" for body in bodies)
    prompts.write_text("".join(lines), encoding="utf-8")
    command = [
        _aiperf_program(), "profile", "--model", "model", "--url", endpoint.url, "--endpoint-type", "template",
        "--extra-inputs", "payload_template:{{ text|safe }}", "--extra-inputs", "response_field:to_string(@)",
        "--input-file", str(prompts), "--custom-dataset-type", "single-turn", "--concurrency", str(load.clients),
        "--benchmark-duration", f"{load.seconds:g}", "--request-timeout-seconds", f"{load.timeout_s:g}",
        # It counts tokens, and its own tokenizer is downloaded.
        "--tokenizer", str(files("modalkit.pipelines") / "sentiment_model"), "--output-artifact-dir", str(artifacts),
        "--ui", "none", "--export-level", "summary", "--no-gpu-telemetry", "--no-server-metrics",
    ]  # fmt: skip
    if load.warm_up_s:
        command += ["--warmup-duration", f"{load.warm_up_s:g}"]
    for name, value in endpoint.headers.items():
        command += ["--header", f"{name}:{value}"]
    said = _output(command)
    results = artifacts / "profile_export_aiperf.json"
    if not results.exists():
        raise BenchError(f"aiperf wrote no results:\n{said[-2000:]}")
    found = json.loads(results.read_text(encoding="utf-8"))
    if found.get("error_summary"):
        raise BenchError(f"aiperf got answers that were no success: {found['error_summary']}")
    return {
        "requests_per_s": float(found["request_throughput"]["avg"]),
        "p50_ms": float(found["request_latency"]["p50"]),
        "p99_ms": float(found["request_latency"]["p99"]),
    }


def _bodies(endpoint: Endpoint, items: Sequence[Any]) -> list[bytes]:
    return [endpoint.content(endpoint.items_of(items, index)) for index in range(endpoint.request_count(items))]


def _aiperf_program() -> str:
    """The program in an environment of its own, made at the first use, because its packages are many and pinned."""
    folder = Path.home() / ".cache" / "modalkit" / "aiperf"
    program = folder / "bin" / "aiperf"
    if not program.exists():
        _output([sys.executable, "-m", "venv", str(folder)])
        _output([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", AIPERF])
    return str(program)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command[:3])} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout
