"""The clients of the benchmark of jobs send what they are given and count the answers."""

from pathlib import Path

import pytest

from modalkit.benchmarks.jobs import JOB, bare, lists, metric, rate, served, wait_until


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
