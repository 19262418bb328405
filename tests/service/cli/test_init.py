"""``modalkit init``: what it writes works as it is."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

from modalkit.service.cli.check import check
from modalkit.service.cli.config import defaults_yaml
from modalkit.service.cli.init import TEMPLATES, Task
from modalkit.service.settings import Settings
from tests.support.command_line import Modalkit, serving
from tests.support.guides import blocks, guide
from tests.support.tiny_models import EXACT, save_model

FILES = {
    Task.EMPTY: {".dockerignore", "Dockerfile", "modalkit.yaml", "pipeline.py", "test_pipeline.py"},
    Task.SENTIMENT: {".dockerignore", "Dockerfile", "modalkit.yaml", "test_service.py"},
}
ITEMS = {Task.EMPTY: {"text": "one two three"}, Task.SENTIMENT: {"text": "What a lovely day!"}}

Started = Callable[..., Path]


@pytest.fixture
def started(modalkit: Modalkit, tmp_path: Path) -> Started:
    """A folder with the files for a task."""

    def init(task: Task, folder: str = "new", *options: str) -> Path:
        done = modalkit("init", folder, "--task", task, *options)
        assert done.returncode == 0, done.stderr
        return tmp_path / folder

    return init


def run_pytest(folder: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "anyio", *options]
    own = environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a user does not have those of our tests
    return subprocess.run(command, check=False, cwd=folder, env=own, text=True, capture_output=True)


def without_measuring(folder: Path) -> None:
    """Have the model of a configuration run by torch in float32."""
    configuration = folder / "modalkit.yaml"
    text = configuration.read_text()
    for key, value in EXACT.items():
        text, count = re.subn(rf"# {key}: auto ", f"{key}: {value} ", text)
        assert count == 1
    configuration.write_text(text)


@pytest.mark.parametrize("task", [Task.EMPTY, Task.SENTIMENT])
def test_what_it_writes_serves(started: Started, environment: dict[str, str], task: Task) -> None:
    folder = started(task)
    assert {path.name for path in folder.iterdir()} == FILES[task]
    if task is not Task.EMPTY:
        without_measuring(folder)
    with serving(folder, environment) as (_, client):
        assert client.post("/sync/predict", json=ITEMS[task]).json()["status"] == "success"


def test_what_it_writes_for_a_model_passes_its_own_tests_and_check(
    started: Started,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With small random models beside the bundled one, by torch in float32: engines are not measured."""
    models: dict[Task, tuple[type[PreTrainedModel], dict[str, Any]]] = {
        Task.EMBEDDING: (BertModel, {}),
        Task.RERANK: (BertForSequenceClassification, {"num_labels": 1}),
        Task.TOKEN_CLASSIFICATION: (BertForTokenClassification, {"id2label": {0: "O", 1: "B-CAT"}}),
        Task.ZERO_SHOT: (BertForSequenceClassification, {"id2label": {0: "contradiction", 1: "entailment"}}),
    }
    tasks = [Task.SENTIMENT, *models]
    assert {Task.EMPTY, *tasks} == set(Task)
    without_measuring(started(Task.SENTIMENT, Task.SENTIMENT))
    for task, (model, config) in models.items():
        save_model(model, tmp_path / "models" / f"my-{task}", **config)
        without_measuring(started(task, task, "--model", f"my-{task}"))
    done = run_pytest(tmp_path, environment, "--import-mode=importlib", *tasks)
    assert f"{len(tasks)} passed" in done.stdout, done.stdout + done.stderr
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for task in tasks:
        check([tmp_path / task / "modalkit.yaml"])
        said = capsys.readouterr()
        assert re.search(rf"{task} .* 4 items in", said.out)
        assert said.err == ""


def test_the_guides_show_its_test_as_it_is_and_another_one_that_passes(
    started: Started, environment: dict[str, str]
) -> None:
    folder = started(Task.EMPTY)
    template, more = blocks(guide("testing.md"), "python")
    tests = folder / "test_pipeline.py"
    assert tests.read_text() == template
    tests.write_text(f"{template}\n{more}")
    done = run_pytest(folder, environment)
    assert "5 passed" in done.stdout, done.stdout + done.stderr


def test_the_guide_has_each_task_with_an_item() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)`[^|]* \|[^|]*\| `(.*)` \|$", guide("init.md"), re.MULTILINE))
    assert {Task(name): set(json.loads(item)) for name, item in rows.items()} == {
        task: set(template.item) for task, template in TEMPLATES.items()
    }


@pytest.mark.parametrize("task", Task)
def test_the_configuration_has_every_key_with_its_comment_and_differs_from_the_defaults_in_the_model_alone(
    started: Started, task: Task
) -> None:
    text = (started(task) / "modalkit.yaml").read_text()
    defaults = defaults_yaml()
    assert "\n  app_prefix: sentiment " in defaults
    text = text.replace('  app_prefix: "new" ', "  app_prefix: sentiment ")
    head = defaults.index("    sentiment:\n")
    assert text[:head] == defaults[:head]
    shared = [line for line in text[head:].splitlines() if line.strip().startswith(("input_model:", "output_model:"))]
    assert len(shared) == 2
    assert all(line in defaults.splitlines() for line in shared)
    settings = Settings.load([started(task, "again") / "modalkit.yaml"], {})
    defaults_of_app = Settings.load([], {}).app_settings
    assert settings.app_settings == defaults_of_app.model_copy(update={"app_prefix": "again"})
    (entry,) = settings.model_settings.model_entries.values()
    assert ("model_path" in entry.arguments()) == (task is not Task.EMPTY)


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.EMPTY])
def test_a_model_can_be_named_and_the_test_has_an_item(modalkit: Modalkit, folder: Path, task: Task) -> None:
    done = modalkit("init", "new", "--task", task, "--model", "my: model")
    assert done.returncode == 0, done.stderr
    entry = Settings.load([folder / "new" / "modalkit.yaml"], {}).model_settings.model_entries[task]
    assert entry.arguments() == {"model_path": "my: model"}
    (item,) = re.findall(r"^ITEM = (.*)$", (folder / "new" / "test_service.py").read_text(), re.MULTILINE)
    assert f"-d {shlex.quote(json.dumps(ast.literal_eval(item)))}" in done.stderr


def test_nothing_is_overwritten_and_nothing_written_beside_it(modalkit: Modalkit, folder: Path) -> None:
    (folder / "new").mkdir()
    (folder / "new" / "Dockerfile").write_text("mine")
    done = modalkit("init", "new")
    assert done.returncode == 2
    assert done.stderr.startswith("modalkit: error: new/Dockerfile exists already")
    assert [path.name for path in (folder / "new").iterdir()] == ["Dockerfile"]
    assert (folder / "new" / "Dockerfile").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_in_the_way_too(modalkit: Modalkit, folder: Path) -> None:
    (folder / "new").mkdir()
    (folder / "new" / "Dockerfile").symlink_to("nowhere")
    done = modalkit("init", "new")
    assert done.stderr.startswith("modalkit: error: new/Dockerfile exists already")
    assert [path.name for path in (folder / "new").iterdir()] == ["Dockerfile"]


def test_a_long_folder_gives_a_prefix_that_the_configuration_takes(started: Started) -> None:
    settings = Settings.load([started(Task.EMPTY, "a" * 70) / "modalkit.yaml"], {})
    assert settings.app_settings.app_prefix == "a" * 48


def test_an_unknown_task_is_refused_with_those_that_there_are(modalkit: Modalkit) -> None:
    done = modalkit("init", "new", "--task", "translation")
    assert done.returncode == 2
    assert "must be one of empty, sentiment," in done.stderr


def test_a_model_without_a_task_is_refused(modalkit: Modalkit) -> None:
    done = modalkit("init", "new", "--model", "mine")
    assert done.returncode == 2
    assert "--model needs a --task" in done.stderr


def test_an_empty_model_is_refused(modalkit: Modalkit) -> None:
    done = modalkit("init", "new", "--task", "embedding", "--model", "")
    assert done.returncode == 2
    assert "--model is empty" in done.stderr


class TestDockerfile:
    """No image is built here; its commands are run."""

    @pytest.fixture
    def instructions(self, started: Started) -> list[tuple[str, str]]:
        text = re.sub(r"^#.*\n", "", (started(Task.EMPTY) / "Dockerfile").read_text(), flags=re.MULTILINE)
        lines = text.replace("\\\n", "").split("\n")
        return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]

    def test_it_says_where_modalkit_comes_from_or_how_to_say_it(
        self, instructions: list[tuple[str, str]], tmp_path: Path
    ) -> None:
        install = next(rest for name, rest in instructions if name == "RUN")
        done = subprocess.run(["/bin/sh", "-c", install], check=False, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert "MODALKIT: is not set: add --build-arg MODALKIT=" in done.stderr
        # With stand-ins for Python and pip, which write down how they are called.
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        for program in (venv / "bin" / "python", venv / "bin" / "pip"):
            program.write_text(f'#!/bin/sh\necho "$(basename $0) $@" >> {tmp_path}/calls\n')
            program.chmod(0o755)
        (tmp_path / "requirements.txt").touch()
        subprocess.run(
            ["/bin/sh", "-c", install.replace("/venv", str(venv))],
            check=True,
            cwd=tmp_path,
            env={"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "MODALKIT": "./modalkit.whl", "TORCH_INDEX": "https://index"},
        )
        assert (tmp_path / "calls").read_text().splitlines() == [
            f"python -m venv {venv}",
            "pip install --no-cache-dir torch --index-url https://index",
            "pip install --no-cache-dir ./modalkit.whl",
            "pip install --no-cache-dir -r requirements.txt",
        ]

    def test_it_serves_to_every_network_keeps_jobs_in_its_volume_and_its_health_check_finds_it(
        self, instructions: list[tuple[str, str]], tmp_path: Path, environment: dict[str, str]
    ) -> None:
        found = {name: rest for name, rest in instructions if name not in ("FROM", "RUN")}
        command = json.loads(found["CMD"])
        assert command == ["modalkit", "serve", "--host", "0.0.0.0", "--port", "8000"]
        variables = dict(pair.split("=", 1) for pair in shlex.split(found["ENV"]))
        del variables["PATH"]
        for name, value in variables.items():
            variables[name] = value.replace(found["VOLUME"], str(tmp_path))
        with serving(tmp_path / "new", environment | variables) as (_, client):
            check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
            assert check[:2] == ["python", "-c"]
            address = str(client.base_url).rstrip("/")
            program = check[2].replace("http://127.0.0.1:8000", address)
            assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
        assert (tmp_path / "modalkit.db").exists()
