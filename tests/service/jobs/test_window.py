"""The jobs that a runner has claimed."""

from modalkit.service.jobs.model import Job
from modalkit.service.jobs.window import Window


def job(job_id: str) -> Job:
    return Job(job_id=job_id, model_name="m", message_json="{}", created_at=0.0)


def test_a_job_that_runs_again_is_not_overdue_by_the_deadline_of_its_earlier_run() -> None:
    window = Window()
    window.add(job("long"), 10.0)
    window.add(job("again"), 11.0)
    window.remove("again")
    window.add(job("again"), 20.0)
    assert [each.job_id for each in window.remove_overdue(12.0)] == ["long"]
    assert window.next_deadline == 20.0
    assert [each.job_id for each in window.remove_overdue(20.0)] == ["again"]
    assert (len(window), window.size_bytes) == (0, 0)
