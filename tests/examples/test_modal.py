"""The programs of docs/modal.md can be deployed, do their work without Modal, and are quoted there as they are."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support import processes
from tests.support.guides import ROOT, blocks, files_in, guide, quoted_files

GUIDE = guide("modal.md")

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program in a copy of the examples, with warnings as errors."""
    folder = shutil.copytree(ROOT / "examples" / "modal", tmp_path / "examples")

    def start(*command: str, **variables: str) -> str:
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONWARNINGS": "error",
        } | variables
        done = processes.run(command, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


def test_the_guide_quotes_the_files_as_they_are() -> None:
    files = files_in("examples/modal")
    quoted = quoted_files(GUIDE)
    assert quoted == {path: files[path] for path in quoted}
    assert {Path(path).name for path in quoted} == {"emphasis.py", "web_function.py"}
    for path in files:
        assert path in GUIDE or f"../{path}" in GUIDE


@pytest.mark.parametrize(
    ("module", "defined"),
    [
        ("web_function", {"classes": ["EmphasisApp"], "functions": ["EmphasisApp.*", "web_endpoints"]}),
        ("on_the_gpu", {"classes": ["EmphasisApp"], "functions": ["EmphasisApp.*"]}),
        ("server", {"classes": ["EmphasisJobs"], "functions": ["EmphasisJobs.*", "EmphasisServer"]}),
        ("web_server", {"classes": ["EmphasisApp"], "functions": ["EmphasisApp.*", "EmphasisWeb"]}),
    ],
)
def test_an_app_is_defined_without_a_token_or_a_network(run: Run, module: str, defined: dict[str, list[str]]) -> None:
    shown = run(
        "-c",
        f"import {module}; state = {module}.app._local_state; "
        "print({'classes': sorted(state.classes), 'functions': sorted(state.functions)})",
    )
    assert YAML(typ="safe").load(shown) == defined


def test_a_dry_run_shows_the_module_that_the_app_imports(run: Run) -> None:
    shown = YAML(typ="safe").load(
        run("-c", "from modalkit.service.cli import main; main()", "deploy", "web_function.py", "--dry-run")
    )
    assert any(step.get("remote_path") == "/root/emphasis.py" for step in shown["image"])


def test_the_class_runs_without_modal(run: Run) -> None:
    (snippet,) = [block for block in blocks(GUIDE, "python") if block.startswith("async with EmphasisService")]
    program = "\n".join(
        [
            "import anyio",
            "from modalkit.task_queue import InMemoryBackend",
            "from web_function import EmphasisService",
            "async def main():",
            re.sub("^", "    ", snippet, flags=re.MULTILINE),
            "anyio.run(main)",
        ]
    )
    assert (
        run("-c", program).strip()
        == "[{'status': 'success', 'error': None, 'meta': {}, 'shouting': 0.2857142857142857}]"
    )


def test_a_program_is_tested_against_a_lost_container(run: Run) -> None:
    (snippet,) = [block for block in blocks(GUIDE, "python") if block.startswith("engine, results")]
    program = "\n".join(
        [
            "import anyio",
            "from modalkit.iomodel import AsyncInputModel",
            "from modalkit.task_queue import InMemoryBackend",
            "from modalkit.testing import InProcessEngine, in_process_gateway",
            "from emphasis import EmphasisPipeline",
            "async def main():",
            re.sub("^", "    ", snippet, flags=re.MULTILINE),
            "anyio.run(main)",
        ]
    )
    assert run("-c", program).strip() == "succeeded 2"


def test_the_class_is_served_without_modal(run: Run) -> None:
    program = """
from fastapi.testclient import TestClient
from modalkit.modal_service import create_web_endpoints
from web_function import EmphasisService
with TestClient(create_web_endpoints(app_cls=EmphasisService)) as client:
    while client.get("/health/ready").status_code != 200:
        pass
    print(client.post("/sync/predict", json={"text": "OK ok"}).json()["shouting"])
"""
    assert run("-c", program, PYTHONWARNINGS="error,ignore::DeprecationWarning").strip() == "0.4"
