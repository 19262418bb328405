"""Tuning as a user does it, in a folder with a configuration, with a model that is quick."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from modalkit.batching import MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement
from modalkit.service.cli.tune import _show_trial, _Tuning
from modalkit.service.settings import Settings
from modalkit.service.tuning.samples import MadeUpSamples
from modalkit.service.tuning.trial import Trial, TrialPlan
from tests.support.command_line import CONFIGURATION, Modalkit
from tests.support.length_model import LengthPipeline

QUICK = ("tune", "--max-seconds", "3")


def test_tuning_shows_costs_limits_reasons_and_what_they_give(modalkit: Modalkit, folder: Path) -> None:
    done = modalkit(*QUICK, "--p99-ms", "500")
    assert done.returncode == 0, done.stderr
    for expected in (
        "size 1000",
        "token x longest",
        "max_batch_seconds",
        "half of what 500 ms leave",
        "p99",
        "items/s",
    ):
        assert expected in done.stdout
    assert (folder / "modalkit.yaml").read_text() == CONFIGURATION


def test_help_has_examples(modalkit: Modalkit) -> None:
    assert "modalkit tune --p99-ms 200 --write modalkit.yaml" in " ".join(modalkit("tune", "--help").stdout.split())


def test_the_limits_are_written_and_loaded(modalkit: Modalkit, folder: Path) -> None:
    path = folder / "modalkit.yaml"
    path.write_text(f"# ours\n{CONFIGURATION}")
    done = modalkit(*QUICK, "--p99-ms", "500", "--write", "modalkit.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["limits"]["max_batch_seconds"] == pytest.approx(0.25, abs=0.05)
    assert min(batch["seconds"] for batch in found["batches"]) > 0
    assert found["trial"]["failed"] == 0
    assert path.read_text().startswith("# ours\n")
    batch_config = Settings.load([path], environ={}).app_settings.batch_config
    assert batch_config.max_batch_seconds == pytest.approx(0.25, abs=0.05)
    assert modalkit("check").returncode == 0


def test_without_an_objective_only_the_batch_size_is_written(installed_modalkit: Modalkit, folder: Path) -> None:
    assert installed_modalkit(*QUICK, "-w", "new.yaml").returncode == 0
    assert Settings.load([folder / "new.yaml"], environ={}).app_settings.batch_config.max_batch_seconds is None
    assert "wait_ms" not in (folder / "new.yaml").read_text()


def test_costs_are_kept_where_the_configuration_says(modalkit: Modalkit, folder: Path) -> None:
    assert modalkit(*QUICK, MODALKIT_APP_SETTINGS__BATCH_CONFIG__CALIBRATION__PATH="costs.json").returncode == 0
    assert "LengthPipeline" in (folder / "costs.json").read_text()


def test_a_plot_is_drawn(modalkit: Modalkit, folder: Path) -> None:
    # Importing it warns of nothing of ours: its own dependencies may.
    done = modalkit(
        "tune", "--max-seconds", "6", "--plot", "costs.png", PYTHONWARNINGS="default", MPLCONFIGDIR=str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "costs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--p99-ms", "0"), 2, "'--p99-ms': must be a number above 0, not 0"),
        (("--p99-ms", "nan"), 2, "'--p99-ms': must be a number above 0, not nan"),
        (("--max-seconds", "-1"), 2, "'--max-seconds': must be a number above 0, not -1"),
        (("--model", "other"), 2, "there is no model 'other'"),
        (("--write", "nowhere/modalkit.yaml"), 2, "create it first"),
        (("--write", "compose.yaml"), 2, "compose.yaml"),
        (("--p99-ms", "0.0001"), 1, "no limits reach --p99-ms 0.0001"),
    ],
)
def test_bad_input_is_one_message(
    modalkit: Modalkit, folder: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (folder / "compose.yaml").write_text("services: {}\n")
    done = modalkit(*QUICK, *arguments)
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert (folder / "compose.yaml").read_text() == "services: {}\n"


def test_a_plot_of_an_unknown_format_is_refused_at_once(modalkit: Modalkit) -> None:
    done = modalkit(*QUICK, "--plot", "costs.txt")
    assert done.returncode == 2
    assert "must end in one of .pdf, .png, .svg" in done.stderr


def test_a_model_without_samples_is_told_to_make_some(modalkit: Modalkit, folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from tests.support.length_model import LengthPipeline\n"
        "class Mine(LengthPipeline):\n"
        "    def sample_items(self, n, size): return []\n"
    )
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {mine: {pipeline: 'mine:Mine'}}}")
    done = modalkit(*QUICK)
    assert done.returncode == 1
    assert "Mine makes up no items to measure: implement sample_items(n, size)" in done.stderr
    assert "--samples FILE" in done.stderr
    assert "Traceback" not in done.stderr
    (folder / "own.jsonl").write_text("".join(f'{{"text": "{"x" * (9 * n)}"}}\n' for n in range(1, 20)))
    done = modalkit(*QUICK, "--samples", "own.jsonl")
    assert done.returncode == 0, done.stderr
    assert "size 171" in done.stdout


def test_samples_are_read_as_predict_reads_its_input(modalkit: Modalkit, folder: Path) -> None:
    (folder / "own.csv").write_text("stars,review\n5,lovely\n1,dreadful\n")
    done = modalkit(*QUICK, "--samples", "own.csv", "--column", "review")
    assert done.returncode == 0, done.stderr
    assert "size 8" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.jsonl", '{"text": "ok"}\n{}\n{"txt": "a"}\n', "line 2: text: is missing: add it; line 3:"),
        ("own.jsonl", "[1\n", "own.jsonl has lines that are no Text: line 1: not JSON"),
        ("own.txt", "fine\n" + "x" * 1001 + "\n", "line 2: text: String should have at most 1000 characters"),
        ("own.txt", "", "--samples own.txt holds no items: put one on each line"),
        ("own.csv", "stars\n5\n", "name the text's with --column"),
        ("own.dat", "fine\n", "say --format txt, jsonl, csv or parquet"),
    ],
)
def test_samples_that_are_none_are_refused_before_the_model_is_loaded(
    modalkit: Modalkit, folder: Path, name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content)
    done = modalkit(*QUICK, "--samples", name)
    assert done.returncode == (2 if name in ("own.csv", "own.dat") else 1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


FAILS_UNDER_LOAD = """
import threading
from tests.support.length_model import LengthPipeline

class Mine(LengthPipeline):
    calls_by_worker = 0  # batches are measured in the main thread; a worker has a thread of its own
    is_broken = False

    def predict(self, input_list, preprocessed_data):
        self.calls_by_worker += threading.current_thread() is not threading.main_thread()
        # A worker warms up and runs lone requests, before the trial sends several at once.
        self.is_broken = self.is_broken or (self.calls_by_worker > 20 and len(input_list) > 1)
        if self.is_broken:
            raise OSError("connection lost")
        return super().predict(input_list, preprocessed_data)
"""


def test_when_requests_of_the_trial_fail_nothing_is_written(modalkit: Modalkit, folder: Path) -> None:
    (folder / "mine.py").write_text(FAILS_UNDER_LOAD)
    configuration = "model_settings: {model_entries: {mine: {pipeline: 'mine:Mine'}}}"
    (folder / "modalkit.yaml").write_text(configuration)
    path = "MODALKIT_APP_SETTINGS__BATCH_CONFIG__CALIBRATION__PATH"
    done = modalkit(*QUICK, "--write", "modalkit.yaml", **{path: "costs.json"})
    assert done.returncode == 1, done.stdout
    assert "requests failed under these limits, so nothing is written" in done.stderr
    assert "OSError: connection lost" in done.stderr
    assert "p99 unknown" in done.stdout
    assert "Traceback" not in done.stderr
    assert (folder / "modalkit.yaml").read_text() == configuration
    assert not (folder / "costs.json").exists()


def test_drawing_takes_no_time_from_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]

    def draw(*_: object) -> None:
        now_s[0] += 7

    monkeypatch.setattr("modalkit.service.cli.tune.draw_costs", draw)
    monkeypatch.setattr("modalkit.service.cli.tune.monotonic", lambda: now_s[0])
    tuning = _Tuning.__new__(_Tuning)
    tuning.shapes, tuning.costs, tuning.deadline_s = [], MeasuredCostModel(), 160.0
    tuning.draw(Path("costs.png"), "a model")
    assert tuning.deadline_s == 167.0


def test_a_slow_first_run_that_was_not_repeated_is_shown_and_not_believed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    believed = [Measurement(1, 8, 8, 0.1), Measurement(2, 8, 16, 0.11)]
    slow_once = Measurement(4, 8, 32, 9.0, is_repeated=False)
    pipeline = LengthPipeline()
    measured = Calibration(
        run=pipeline.run_inference, sample_items=pipeline.sample_items, item_size=pipeline.item_size, max_count=4
    )
    measured.measurements.extend([*believed, slow_once])
    monkeypatch.setattr("modalkit.service.cli.tune.measure", lambda *_, **__: measured)
    tuning = _Tuning(pipeline, Settings(), MadeUpSamples(pipeline), 60.0, is_quiet=False)
    assert tuning.shapes == believed
    shown = capsys.readouterr().out
    assert "9,000" in shown
    assert "1 of these ran once" in shown


def test_rates_are_written_without_an_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    trial = Trial(sent=9, failed=0, unfinished=0, p50_s=0.1, p99_s=0.2, items_per_s=1234.5, first_error=None)
    plan = TrialPlan(rate_per_s=1000.0, duration_s=1, patience_s=1)
    _show_trial(Console(width=200), trial, plan, "70 %", None)
    shown = capsys.readouterr().out
    assert "1,000 a second" in shown
    assert "1,234 items/s" in shown
