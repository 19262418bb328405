"""The worker with the bundled model; see `modalkit.benchmarks.end_to_end`."""

from modalkit.benchmarks.conftest import MeasureStudy
from modalkit.benchmarks.report import StudyName, make_study


def test_the_worker_reaches_the_offline_limit(measure_study: MeasureStudy) -> None:
    """Reaches every target of the study."""
    measure_study(make_study(StudyName.END_TO_END))
