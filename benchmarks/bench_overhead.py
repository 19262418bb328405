"""What the scheduler itself costs; see `modalkit.benchmarks.overhead`."""

from modalkit.benchmarks.conftest import MeasureStudy
from modalkit.benchmarks.report import StudyName, make_study


def test_the_scheduler_costs_little(measure_study: MeasureStudy) -> None:
    """Reaches every target of the study."""
    measure_study(make_study(StudyName.OVERHEAD))
