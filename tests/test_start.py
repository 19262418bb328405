"""What README.md, docs/start.md and docs/configuration.md show works as printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from modalkit.service.settings import Settings
from tests.support.command_line import CONFIGURATION, serving

ROOT = Path(__file__).parents[1]
README, START = ((ROOT / path).read_text() for path in ("README.md", "docs/start.md"))


def blocks(language: str, page: str = START) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}


def write_files(page: str, folder: Path) -> None:
    """Write the files that the page shows for a model of one's own."""
    for language in ("python", "yaml"):
        for block in blocks(language, page):
            if named := re.match(r"# (\S+\.(?:py|yaml))\n", block):
                (folder / named[1]).write_text(block)
    assert sorted(path.name for path in folder.iterdir()) == ["modalkit.yaml", "my_module.py"]


@pytest.mark.parametrize("page", [README, START], ids=["README.md", "docs/start.md"])
def test_a_model_of_ones_own_is_one_class_and_one_line(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    write_files(page, tmp_path)
    with serving(tmp_path, environment) as (_, client):
        assert client.post("/sync/predict", json={"text": "one two three"}).json()["words"] == 3


def test_the_program_without_http_prints_its_results(tmp_path: Path, environment: dict[str, str]) -> None:
    write_files(START, tmp_path)
    (program,) = [block for block in blocks("python") if "anyio.run" in block]
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    first, second = done.stdout.splitlines()
    assert "words=3" in first
    assert json.loads(second)["result"]["words"] == 2


def test_the_settings_in_the_table_have_the_defaults_it_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (\S+) \|", page, re.MULTILINE)
    assert len(rows) > 8
    app_settings = Settings.load([]).app_settings
    for section, key, shown in rows:
        default = getattr(getattr(app_settings, section), key)
        assert shown == ("none" if default is None else str(default).removesuffix(".0").lower())


def test_the_quick_start_of_the_readme_is_that_of_the_guide() -> None:
    assert blocks("json", README) == blocks("json")
    assert [block for block in blocks("bash", README) if block not in blocks("bash")] == ["make test\n"]


def test_the_bundled_model_answers_the_quick_start_as_printed(tmp_path: Path, environment: dict[str, str]) -> None:
    """The commands and the program of the quick start, run against a server with the bundled model."""
    entries = YAML(typ="safe").load(CONFIGURATION)
    del entries["model_settings"]
    (tmp_path / "modalkit.yaml").write_text(json.dumps(entries))
    with serving(tmp_path, environment) as (_, client):
        address = str(client.base_url).rstrip("/")

        def shell(command: str) -> str:
            command = command.replace("http://127.0.0.1:8000", address).replace("curl ", "curl -s ")
            return subprocess.run(
                ["/bin/sh", "-c", command], check=True, capture_output=True, text=True, timeout=60
            ).stdout

        first, batch, jobs = (block for block in blocks("bash") if block.startswith("curl"))
        (shown,) = blocks("json")
        answer = json.loads(shell(first))
        assert answer == {**json.loads(shown), "confidence": pytest.approx(json.loads(shown)["confidence"], abs=0.006)}
        slots = json.loads(shell(batch))
        assert [slot["status"] for slot in slots] == ["success", "error"]
        submit, find = jobs.splitlines()
        job_id = json.loads(shell(submit))["job_id"]
        job = json.loads(shell(find.replace("<the job_id>", job_id)))
        assert job["status"] == "succeeded"
        (program,) = [block for block in blocks("python") if "import httpx" in block]
        done = subprocess.run(
            [sys.executable, "-c", program.replace("http://127.0.0.1:8000", address)],
            check=True,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.stdout == "positive\nsucceeded positive\n"
