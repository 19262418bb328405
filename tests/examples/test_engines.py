"""What docs/engines.md shows works as printed."""

import re
import subprocess
import sys
from typing import get_args

from modalkit.pipelines.engines.settings import EngineName, EngineSettings
from tests.support.guides import ROOT, guide, quoted_files

GUIDE = guide("engines.md")


def test_the_program_is_the_one_of_the_guide_and_runs() -> None:
    path = "examples/engines/moods.py"
    assert quoted_files(GUIDE) == {path: (ROOT / path).read_text()}
    done = subprocess.run(
        [sys.executable, path], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "torch float32, as configured\n['calm', 'wild']\n"


def test_the_table_has_every_engine_and_the_text_the_defaults() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", GUIDE, re.MULTILINE) == list(get_args(EngineName))
    defaults = EngineSettings()
    assert f"at least {defaults.sameness.label_agreement:.1%}".replace("%", " %") in GUIDE
    assert f"at most {defaults.measure_seconds:g} seconds" in GUIDE
    assert defaults.max_copied_bytes == 2**30
