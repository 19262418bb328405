"""How to install an extra: from where modalkit came, never by its name alone, which is another project's."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from modalkit.pipelines.extras import install_command


class Installed:
    """A distribution with that record of its origin."""

    def __init__(self, record: object) -> None:
        self._record = record

    def read_text(self, name: str) -> str | None:
        return None if self._record is None else json.dumps(self._record)


@pytest.mark.parametrize(
    ("record", "command"),
    [
        ({"url": "file://{folder}", "dir_info": {"editable": True}}, "pip install -e '{folder}[sqs]'"),
        ({"url": "file://{folder}", "dir_info": {}}, "pip install '{folder}[sqs]'"),
        ({"url": "file:///gone/a.whl"}, "pip install '/path/to/modalkit[sqs]' (the folder of a clone, or a wheel)"),
        ({"url": "https://host/a.whl"}, "pip install '/path/to/modalkit[sqs]' (the folder of a clone, or a wheel)"),
        (None, "pip install '/path/to/modalkit[sqs]' (the folder of a clone, or a wheel)"),
    ],
)
def test_an_extra_is_installed_from_where_modalkit_came(
    record: dict[str, str] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if record is not None:
        record = record | {"url": record["url"].format(folder=tmp_path)}
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(record))
    assert install_command("sqs") == command.format(folder=tmp_path)


def test_no_text_says_to_install_an_extra_by_the_name_alone() -> None:
    root = Path(__file__).parents[2]
    folders = ("batching", "benchmarks", "docs", "examples", "modalkit", "pipelines", "service")
    files = [root / "README.md", *(file for name in folders for file in (root / name).rglob("*.*"))]
    texts = {file: file.read_text() for file in files if file.suffix in (".md", ".py", ".yaml")}
    assert [str(file) for file, text in texts.items() if "pip install 'modalkit" in text or "`modalkit[" in text] == []
