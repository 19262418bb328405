"""How the time for one request grows with the queue; see `modalkit.benchmarks.growth`."""

from modalkit.benchmarks.conftest import MeasureStudy
from modalkit.benchmarks.report import StudyName, make_study


def test_a_long_queue_makes_no_request_expensive(measure_study: MeasureStudy) -> None:
    """Reaches every target of the study."""
    measure_study(make_study(StudyName.GROWTH))
