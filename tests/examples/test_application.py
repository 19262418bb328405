"""The programs of docs/in-your-application.md work, and are quoted there as they are."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import processes
from tests.support.guides import ROOT, blocks, files_in, guide, quoted_files
from tests.support.http_client import NO_TLS, assert_problem

GUIDE = guide("in-your-application.md")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": os.defpath, "PYTHONWARNINGS": "error"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples."""
    return Path(shutil.copytree(ROOT / "examples" / "application", tmp_path / "examples"))


@contextmanager
def uvicorn_serves(module: str, folder: Path) -> Iterator[httpx.Client]:
    """A client of ``uvicorn module:app --port 0``, once that serves."""
    command = [sys.executable, "-m", "uvicorn", f"{module}:app", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "running on" in line:
                    break
            url = next((word for word in lines[-1].split() if word.startswith("http")), None)
            assert url is not None, "".join(lines)
            with httpx.Client(base_url=url, timeout=60, verify=NO_TLS) as client:
                yield client
        finally:
            server.terminate()


def test_the_guide_quotes_the_files_as_they_are() -> None:
    assert quoted_files(GUIDE) == files_in("examples/application")


def test_the_program_without_http_prints_what_the_guide_shows(folder: Path) -> None:
    done = processes.run(["program.py"], check=True, cwd=folder, env=ENVIRONMENT)
    assert [done.stdout] == blocks(GUIDE, "")


def test_the_routes_are_below_the_path_of_the_mount(folder: Path) -> None:
    with uvicorn_serves("mounted", folder) as client:
        while client.get("/models/health/ready").status_code != 200:
            pass
        assert client.post("/models/sync/predict", json={"text": "one two three"}).json()["words"] == 3
        job_id = client.post("/models/async/predict", json={"message": {"text": "one two"}}).json()["job_id"]
        assert client.get(f"/models/jobs/{job_id}?wait=30").json()["result"]["words"] == 2
        page = client.get("/models/docs").text
        assert "'/models/openapi.json'" in page
        (script,) = [part.split('"')[0] for part in page.split('src="')[1:]]
        assert script.startswith("/models/")
        assert client.get(script).status_code == 200
        assert_problem(client.get("/models/nothing"), 404)


def test_routes_of_the_application_use_the_same_models(folder: Path) -> None:
    with uvicorn_serves("own_routes", folder) as client:
        assert client.post("/longest", json=["one", "one two three", "one two"]).json() == "one two three"
        assert client.post("/models/sync/predict", json={"text": "one two"}).json()["words"] == 2
