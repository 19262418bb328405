"""What a plot needs is checked before anything is measured."""

from pathlib import Path

import pytest

from modalkit.service.errors import UsageError
from modalkit.service.tuning import TuningError, plots


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)  # as where it is not installed
    with pytest.raises(TuningError, match=r"pip install .*/.+\[bench\]'"):
        plots.require_drawable(tmp_path / "costs.png")


@pytest.mark.parametrize(
    ("name", "message"), [("costs.txt", "must end in one of"), ("nowhere/costs.png", "create it first")]
)
def test_a_name_that_cannot_be_drawn_to_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plots.require_drawable(tmp_path / name)
