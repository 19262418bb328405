from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store in a file is to be, in folders that do not exist."""
    return tmp_path / "deep" / "down" / "jobs.db"
