"""The pictures of docs/batching.md can be drawn anew."""

from pathlib import Path

from typer.testing import CliRunner

from modalkit.benchmarks.simulate.__main__ import app

PICTURES = Path(__file__).parents[3] / "docs" / "pictures"


def test_the_pictures_that_are_kept_are_those_that_are_drawn(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pictures", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert sorted(drawn) == sorted(path.name for path in PICTURES.iterdir())
