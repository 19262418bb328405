"""The clients of the benchmark of jobs send what they are given and count the answers."""

from pathlib import Path

import pytest

from modalkit.benchmarks.jobs import JOB, bare, lists, metric, rate, read_rate, reads, served, wait_until


def test_jobs_are_accepted_as_often_as_they_are_sent(tmp_path: Path) -> None:
    with served(tmp_path) as url:
        assert rate(f"{url}/async/predict", [JOB] * 30, 4, 30) > 0
        assert rate(f"{url}/async/predict", lists(2000), 2, 2000) > 0
        wait_until(lambda: metric(url, 'modalkit_deliveries{delivery="memory"}') == 2030, timeout_s=60)
        with pytest.raises(RuntimeError, match="HTTP 422"):
            rate(f"{url}/async/predict", [b"{}"] * 3, 2, 3)


def test_the_service_that_it_is_compared_with_validates_the_same_model() -> None:
    with bare() as url:
        assert rate(f"{url}/validate", [JOB] * 2, 2, 2) > 0
        with pytest.raises(RuntimeError, match="HTTP 422"):
            rate(f"{url}/validate", [b"{}"], 1, 1)


def test_reads_of_a_job_that_has_ended_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    reads(1, 70)
    progress, told = capsys.readouterr().out.splitlines()
    assert progress.startswith("  bare ")
    assert told.startswith("reads of a job that has ended, 64 clients, beside a route that validates and answers: ")


def test_a_job_that_cannot_be_read_is_no_measurement(tmp_path: Path) -> None:
    with served(tmp_path) as url, pytest.raises(RuntimeError, match="HTTP 404"):
        read_rate(url, "5f3c1a7e-0000-4000-8000-000000000000", 2, 4)
