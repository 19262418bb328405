"""The studies of `report` as a pytest-benchmark suite: ``pytest benchmarks`` fails where a target is missed."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from modalkit.benchmarks.report import StudyName, figures_table, make_study

ROUNDS = 3


@pytest.mark.parametrize("name", StudyName)
def test_a_study_meets_its_targets(
    name: StudyName, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs a study, prints its figures, and reaches every target.

    The time that pytest-benchmark measures is that of a whole round; the figures of each round are in its `extra_info`.
    """
    study = make_study(name)
    study.warm_up()
    benchmark.pedantic(study.run_round, rounds=ROUNDS)  # type: ignore[no-untyped-call]  # of the library
    figures = study.figures()
    benchmark.extra_info.update({figure.name: figure.rounds for figure in figures})
    with capsys.disabled():
        Console(width=110).print(figures_table(study.name, figures))
    missed = [figure.name for figure in figures if figure.is_met is False]
    assert not missed, f"targets missed: {', '.join(missed)}"  # noqa: S101  # a pytest suite
