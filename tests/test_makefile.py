"""What `make` says where it cannot work."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make") or "make"


def test_a_python_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    done = subprocess.run(
        [MAKE, "run", "PYTHON=no-such-python", f"VENV={tmp_path}/new"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("There is no program 'no-such-python'. Install Python 3.11 or newer")
    assert "make PYTHON=python3.12 run" in done.stderr
