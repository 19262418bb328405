"""What the options of the command ask for."""

import pytest

from modalkit.benchmarks.containers.matrix import BATCH_LIMIT_VARIABLE, Variant, parse_matrix
from modalkit.service.settings import Settings


def test_each_gpu_is_measured_with_each_limit_under_each_number_of_callers() -> None:
    matrix = parse_matrix("T4, L4,T4", "8,32", "64,512", 20.0, keeps_records=True)
    assert list(matrix.variants()) == [Variant("T4", 8), Variant("T4", 32), Variant("L4", 8), Variant("L4", 32)]
    assert matrix.load.concurrency == (64, 512)
    assert matrix.load.duration_s == 20.0
    assert matrix.load.keeps_records


@pytest.mark.parametrize(
    ("gpus", "batch_sizes", "concurrency", "seconds", "complaint"),
    [
        ("T4,,L4", "8", "64", 1.0, "--gpus 'T4,,L4': one of the names is empty; give names of GPUs, as T4,L4"),
        ("T4", "8,all", "64", 1.0, "--batch-sizes '8,all': .* give numbers from 1, as 8,32"),
        ("T4", "8", "0", 1.0, "--concurrency '0': 0 is less than 1; give numbers from 1"),
        ("T4", "8", "64", 0.0, "--seconds 0: give how long"),
        ("T4", "8", "64", float("nan"), "--seconds nan: give how long"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_option(
    gpus: str, batch_sizes: str, concurrency: str, seconds: float, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_matrix(gpus, batch_sizes, concurrency, seconds, keeps_records=False)


@pytest.mark.parametrize("name", [BATCH_LIMIT_VARIABLE, BATCH_LIMIT_VARIABLE.lower()])
def test_a_container_has_its_own_limit_and_all_else_as_deployed(name: str) -> None:
    deployed = {name: "16", "MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS": "5"}
    batch_config = Settings.load([], Variant("T4", 128).environment(deployed)).app_settings.batch_config
    assert batch_config.max_batch_size == 128
    assert batch_config.wait_ms == 5
