"""How the suites measure: every way in turn, in rounds that pytest-benchmark counts and keeps."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from modalkit.benchmarks.measurement import Study
from modalkit.benchmarks.report import figures_table

MeasureStudy = Callable[[Study], None]


@pytest.fixture
def measure_study(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> MeasureStudy:
    """Measures a study in three rounds, prints its figures, and fails where one misses its target.

    pytest-benchmark's own figure is the time of a whole round; ours are in its `extra_info`.
    """

    def measure(study: Study) -> None:
        study.warm_up()
        benchmark.pedantic(study.run_round, rounds=3)  # type: ignore[no-untyped-call]  # the library's own omission
        figures = study.figures()
        benchmark.extra_info.update({figure.name: figure.rounds for figure in figures})
        with capsys.disabled():
            print()
            Console(width=110).print(figures_table(study.name, figures))
        missed = [figure.name for figure in figures if figure.is_met is False]
        if missed:
            pytest.fail(f"missed the target of: {', '.join(missed)}", pytrace=False)

    return measure
