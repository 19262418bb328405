"""The environment of a peer has its own packages before those of this one."""

import subprocess
from pathlib import Path

import pytest

from modalkit.benchmarks.peers import environments


def test_an_environment_shares_what_it_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "small.txt").write_text("# nothing of its own\n")
    monkeypatch.setattr(environments, "REQUIREMENTS", requirements)
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path / "peers")
    shown: list[str] = []
    environments.build("small", shown.append)
    environments.build("small", shown.append)  # it is there already
    assert len(shown) == 1
    asked = "import modalkit.benchmarks, sys; print(sys.prefix)"
    done = subprocess.run(
        [environments.python_of("small"), "-c", asked], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == str(tmp_path / "peers" / "small")
    assert environments.versions_of("small") == {}


def test_every_peer_with_requirements_pins_all_of_them() -> None:
    for name in environments.environment_names():
        lines = (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        assert all("==" in line for line in lines if not line.startswith("#")), name
