"""modalkit, installed, beside a project whose packages have the names of modalkit's own."""

import compileall
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
COMMAND = "from importlib.metadata import entry_points as e; e(group='console_scripts')['modalkit'].load()()"

WORD_COUNT = """
from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel
from pydantic import BaseModel

class Text(BaseModel):
    text: str

class Count(InferenceOutputModel):
    words: int

class WordCount(InferencePipeline):
    input_model = Text
    output_model = Count

    def preprocess(self, input_list):
        return {"texts": [item.text for item in input_list]}

    def predict(self, input_list, preprocessed_data):
        return preprocessed_data

    def postprocess(self, input_list, raw_output):
        return [Count(words=len(text.split())) for text in raw_output["texts"]]
"""
WEB = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from modalkit import InferenceWorker
from service.wordcount import Text, WordCount

@asynccontextmanager
async def lifespan(app):
    async with InferenceWorker(WordCount("words", ".", {})) as app.state.worker:
        yield

app = FastAPI(lifespan=lifespan)

@app.get("/count")
async def count(text: str) -> int:
    return (await app.state.worker.predict(Text(text=text))).words
"""
TESTS = """
import batching, benchmarks, pipelines, service
import modalkit, modalkit.modal_service, modalkit.task_queue
from modalkit.inference_pipeline import InferencePipeline
from service.wordcount import WordCount

def test_both_are_there():
    assert {batching.OWNER, benchmarks.OWNER, pipelines.OWNER, service.OWNER} == {"the user"}
    assert issubclass(WordCount, InferencePipeline)
    assert InferencePipeline.__module__ == "modalkit.pipelines.inference_pipeline"
"""
CONFIGURATION = """
app_settings:
  async_config: {store: memory}
model_settings:
  model_entries:
    words: {pipeline: "service.wordcount:WordCount"}
    sentiment: {pipeline: "pipelines.sentiment:SentimentPipeline", model_path: bundled, engine: torch, dtype: float32}
"""

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Of pytest: all those of the tests of this project take a second to import."""

Python = Callable[..., subprocess.CompletedProcess[str]]


def build(target: str, source: Path, folder: Path) -> Path:
    """What hatchling makes of `source`, in `folder`."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, check=True, cwd=source, capture_output=True)
    (made,) = folder.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return made


def install(target: str, folder: Path) -> Path:
    """The Python of a virtual environment that has modalkit, and what modalkit depends on."""
    made = build(target, ROOT, folder)
    venv.create(folder / "venv", symlinks=True)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    with ZipFile(made) as archive:  # a wheel of nothing but Python is installed by unpacking it
        archive.extractall(site_packages)  # noqa: S202  # just built
    compileall.compile_dir(site_packages, quiet=2)  # as pip does
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install("wheel:editable", tmp_path_factory.mktemp("editable"))


@pytest.fixture(params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> Path:
    python: Path = request.getfixturevalue(request.param)
    return python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("batching", "benchmarks", "pipelines", "service"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the user'\n")
    (tmp_path / "service" / "wordcount.py").write_text(WORD_COUNT)
    (tmp_path / "service" / "web.py").write_text(WEB)
    (tmp_path / "test_mine.py").write_text(TESTS)
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    return tmp_path


@pytest.fixture
def python(installed: Path, project: Path) -> Python:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MODAL"))}
        return subprocess.run(
            [installed, *arguments], check=False, cwd=project, env=environ | variables, text=True, capture_output=True
        )

    return run


def test_the_wheel_holds_one_package_with_its_data(wheel: Path) -> None:
    (site_packages,) = wheel.parent.parent.glob("lib/python*/site-packages")
    folders = {path.name for path in site_packages.iterdir() if path.is_dir()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"modalkit"}
    for needed in (
        "modalkit.yaml",
        "py.typed",
        "batching/scheduler.py",
        "benchmarks/bench/page.html",
        "benchmarks/corpus/mixed_length.txt.gz",
        "pipelines/sentiment_model/model.safetensors",
        "service/cli/main.py",
        "service/cli/templates/Dockerfile",
    ):
        assert (site_packages / "modalkit" / needed).is_file()


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with ZipFile(build("wheel", source, tmp_path)) as archive_again:
        made_again = set(archive_again.namelist())
    (from_checkout,) = wheel.parents[2].glob("*.whl")
    with ZipFile(from_checkout) as archive_first:
        assert set(archive_first.namelist()) == made_again


@pytest.mark.parametrize(
    ("installed", "import_mode"), [("wheel", "prepend"), ("editable", "importlib")], indirect=["installed"]
)
def test_under_pytest(python: Python, import_mode: str) -> None:
    done = python("-m", "pytest", f"--import-mode={import_mode}", "-p", "no:cacheprovider", **NO_PLUGINS)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_the_command_line_runs_the_users_pipeline_and_the_bundled_one_by_its_former_name(python: Python) -> None:
    done = python("-P", "-c", COMMAND, "check")
    assert done.returncode == 0, done.stderr
    assert "WordCount" in done.stdout
    assert "SentimentPipeline" in done.stdout


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_a_misspelt_module_of_the_users_package_is_named(python: Python, project: Path) -> None:
    (project / "modalkit.yaml").write_text(CONFIGURATION.replace("service.wordcount", "service.worker_count"))
    done = python("-P", "-c", COMMAND, "check")
    assert done.returncode == 2
    assert "model_entries.words.pipeline: there is no module 'service.worker_count'" in done.stderr


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_a_new_service_is_written_from_the_package(python: Python, project: Path) -> None:
    done = python("-P", "-c", COMMAND, "init", "new")
    assert done.returncode == 0, done.stderr
    assert (project / "new" / "modalkit.yaml").read_text().startswith((ROOT / "modalkit.yaml").read_text()[:100])
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-p", "anyio", "new", **NO_PLUGINS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_under_uvicorn(installed: Path, project: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MODAL"))}
    command = [str(installed), "-m", "uvicorn", "service.web:app", "--port", "0"]
    with subprocess.Popen(command, cwd=project, env=environ, text=True, stderr=subprocess.PIPE) as server:
        try:
            assert server.stderr is not None
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "running on" in line:
                    break
            url = next((word for word in lines[-1].split() if word.startswith("http")), "")
            assert url, "".join(lines)
            assert httpx.get(f"{url}/count", params={"text": "two words"}).json() == 2
        finally:
            server.terminate()


def test_the_image_on_modal_has_both(python: Python, project: Path) -> None:
    done = python("-P", "-c", COMMAND, "deploy", "--dry-run", MODAL_CONFIG_PATH="none.toml")
    assert done.returncode == 0, done.stderr
    copied = {
        step["remote_path"]: Path(step["add_local_dir"])
        for step in YAML(typ="safe").load(done.stdout)["image"]
        if "add_local_dir" in step
    }
    own = {remote: local for remote, local in copied.items() if Path(remote).is_relative_to("/root/modalkit")}
    assert {remote: local for remote, local in copied.items() if remote not in own} == {
        "/root/service": project / "service"
    }
    for needed in ("__init__.py", "batching/scheduler.py", "service/worker.py"):
        folders = [
            local / Path("/root/modalkit", needed).relative_to(remote)
            for remote, local in own.items()
            if Path("/root/modalkit", needed).is_relative_to(remote)
        ]
        assert any(file.is_file() for file in folders), needed
