"""The names of classes in a configuration."""

from pathlib import Path

import pytest

from modalkit.pipelines import InferencePipeline
from modalkit.service.loading import LoadError, current_name, import_object


def test_a_former_name_is_the_same_class_and_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this checkout, too, where Python finds the folder by the former name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    assert import_object("pipelines.inference_pipeline:InferencePipeline", "key") is InferencePipeline


def test_a_module_of_the_users_goes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "nothing.py").touch()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert current_name("benchmarks.nothing") == "benchmarks.nothing"
    assert current_name("benchmarks.jobs") == "modalkit.benchmarks.jobs"


class Outer:
    class Inner: ...


def test_a_class_may_be_inside_another() -> None:
    assert import_object(f"{__name__}:Outer.Inner", "key") is Outer.Inner
    with pytest.raises(LoadError, match=r"has no 'Outer\.Other'"):
        import_object(f"{__name__}:Outer.Other", "key")


def test_what_neither_has_is_named_as_configured() -> None:
    with pytest.raises(LoadError, match=r"there is no module 'service\.wordcount'"):
        import_object("service.wordcount:WordCount", "key")
