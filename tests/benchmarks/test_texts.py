"""Where the texts of a measurement come from."""

from pathlib import Path

import pytest
import typer

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.texts import read_texts


def test_the_corpus_goes_by_its_name() -> None:
    assert read_texts("corpus", 7) == mixed_length_texts(7)


def test_lines_of_a_file_are_texts_unless_they_are_blank(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\n\n  \ntwo words\nthree\n", encoding="utf-8")
    assert read_texts(str(tmp_path / "texts"), 2) == ["one", "two words"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\xff\xfe", "utf-8"), (b"\n \n", "has no text")]
)
def test_a_file_without_texts_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "texts"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(typer.BadParameter, match=message) as refused:
        read_texts(str(file))
    assert str(file) in str(refused.value)
