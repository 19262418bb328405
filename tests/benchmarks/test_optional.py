"""The benchmarks run without the libraries of extras, and name the extra where one is asked for."""

import subprocess
import sys

BLOCKED = ["batched", "matplotlib", "pynvml", "pytest", "pytest_benchmark", "redis", "scipy", "taskiq", "taskiq_redis"]
PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))  # as if they were not installed
from importlib import import_module
import typer.testing
import modalkit.benchmarks.bench.cli, modalkit.benchmarks.bare_servers, modalkit.benchmarks.modal_gpu
for name in ("jobs", "mixed_load", "report", "simulate.__main__"):
    import_module(f"modalkit.benchmarks.{{name}}")
run = typer.testing.CliRunner().invoke
print(run(modalkit.benchmarks.bench.cli.app, ["--png", "http://127.0.0.1:1"]).exception)
print(run(modalkit.benchmarks.bench.cli.app, ["--mode", "async", "--queue", "redis://127.0.0.1:1"]).exception)
for module, arguments in (("report", ["--only", "overhead"]), ("jobs", ["--only", "redis"])):
    app = typer.Typer()
    app.command()(import_module(f"modalkit.benchmarks.{{module}}").main)
    print(" ".join(run(app, arguments).output.split()))
"""


def test_what_is_not_installed_is_named_with_its_extra_where_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    png, queue, overhead, jobs = done.stdout.splitlines()
    assert "--png needs matplotlib: pip install" in png
    assert "--queue redis needs the client of Redis: pip install" in queue
    assert "overhead needs the library batched" in overhead
    assert "redis needs the client of Redis" in jobs
