from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the project's own modalkit.yaml by accident, or leaves a database there."""
    monkeypatch.chdir(tmp_path)
