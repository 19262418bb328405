"""What batches cost is measured at start, kept between starts, and never worth failing for."""

import fcntl
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from modalkit.batching import MeasuredCostModel
from modalkit.service.learnt_costs import CostKey, save_costs
from modalkit.service.settings import Settings
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


def settings(path: Path | None = None, **calibration: Any) -> Settings:
    return Settings(app_settings={"batch_config": {"calibration": {"path": path, **calibration}}})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "costs" / "batches.json"


async def test_a_worker_knows_the_costs_of_its_pipeline_before_the_first_request() -> None:
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings()) as worker:
        assert worker.costs.observed > 5
        assert worker.statistics().batches == 0, "a measurement is no request"
    shapes = {(len(texts), len(texts[0])) for texts in pipeline.batches}
    assert {(1, 8), (1, 1000), (32, 8)} <= shapes


@pytest.mark.parametrize("how", [{"enabled": False}, {}])
async def test_measuring_can_be_left_out(how: dict[str, bool]) -> None:
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(None, **how), calibrate=bool(how)) as worker:
        assert worker.costs.observed == 0
        assert await worker.predict(Text(text="four")) == Length(length=4)
        assert worker.costs.observed == 1


async def test_costs_are_kept_and_not_measured_again(path: Path) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)) as worker:
        await worker.predict(Text(text="four"))
        costs = worker.costs.costs
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)) as worker:
        assert worker.costs.costs == pytest.approx(costs)
    assert len(pipeline.batches) == 1, "only the warm-up"


async def test_costs_learnt_without_measuring_are_not_kept_in_place_of_measured_ones(path: Path) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path), calibrate=False) as worker:
        await worker.predict(Text(text="four"))
    assert not path.exists()
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)):
        assert len(pipeline.batches) > 5


async def test_where_nothing_is_ever_measured_what_real_batches_taught_is_kept(path: Path) -> None:
    for observed in (1, 2):
        async with InferenceWorker(LengthPipeline(), settings=settings(path, enabled=False)) as worker:
            await worker.predict(Text(text="four"))
            assert worker.costs.observed == observed


async def test_models_that_write_their_costs_at_the_same_time_lose_none(path: Path) -> None:
    async with anyio.create_task_group() as task_group:
        for number in range(20):
            key = CostKey("module:Class", f"model {number}", "device")
            task_group.start_soon(anyio.to_thread.run_sync, save_costs, path, key, MeasuredCostModel())
    assert len(json.loads(path.read_text())["tables"]) == 20
    assert sorted(file.name for file in path.parent.iterdir()) == ["batches.json", "batches.json.lock"]


class Closed(LengthPipeline):
    """Remembers that it was closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


async def test_a_pipeline_that_has_taken_over_stays_open_where_its_worker_is_cancelled_while_costs_are_written(
    path: Path,
) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)) as worker:
        new = Closed()
        async with anyio.create_task_group() as task_group:
            with path.with_name(f"{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # as another process that writes its costs
                task_group.start_soon(worker.replace, [new], worker.limits)
                while worker.pipeline is not new:
                    await anyio.sleep(0.001)
                task_group.cancel_scope.cancel()
        assert not new.is_closed
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert new.is_closed


async def test_a_pipeline_that_takes_over_starts_from_the_costs_before_it_and_is_measured_at_the_next_start(
    path: Path,
) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)) as worker:
        observed = worker.costs.observed
        await worker.replace([LengthPipeline(weights="new")], worker.limits)
        assert worker.costs.observed == observed
        await worker.predict(Text(text="four"))
        assert len(json.loads(path.read_text())["tables"]) == 1
        await worker.replace([LengthPipeline()], worker.limits)
        assert worker.costs.observed == observed, "as it was measured before"
    assert len(json.loads(path.read_text())["tables"]) == 1


async def test_the_first_runs_of_a_pipeline_that_takes_over_may_be_slow_and_change_no_costs() -> None:
    """It may compile something for each number of requests, as the one before it did."""
    counts = (1, 2, 3, 4)
    async with InferenceWorker(LengthPipeline(), calibrate=False) as worker:
        for count in counts * 10:
            worker.costs.observe(count, 4, 4 * count, 0.001 * count)
        expected_s = [worker.costs.predict_s(count, 4, 4 * count) for count in counts]
        await worker.replace([LengthPipeline()], worker.limits)
        for count in counts:
            worker.costs.observe(count, 4, 4 * count, 10.0)
        assert [worker.costs.predict_s(count, 4, 4 * count) for count in counts] == expected_s
        await worker.set_limits(worker.limits)  # it is the same pipeline that goes on
        for count in counts:
            worker.costs.observe(count, 4, 4 * count, 10.0)
        assert worker.costs.predict_s(1, 4, 4) > 100 * expected_s[0]


async def test_a_secret_in_the_entry_of_a_model_is_not_written(path: Path) -> None:
    async with InferenceWorker(LengthPipeline(token="hf_secret"), settings=settings(path)):
        pass
    assert "hf_secret" not in path.read_text()


class Nameless(LengthPipeline):
    error: BaseException = OSError("no such device")

    def device_name(self) -> str:
        raise self.error


@pytest.mark.parametrize("error", [OSError("no such device"), Panic()])
async def test_a_device_without_a_name_costs_only_the_file(
    path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Nameless, "error", error)
    async with InferenceWorker(Nameless(), settings=settings(path)) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert not path.exists()
    assert "device_name failed" in caplog.text


async def test_a_pipeline_that_misspells_its_cost_feature_is_told_so() -> None:
    class Misspelt(LengthPipeline):
        cost_feature = "paded"  # type: ignore[assignment]  # that is the point

    with pytest.raises(ValueError, match=r"Misspelt.cost_feature must be 'padded' or 'total', got 'paded'"):
        InferenceWorker(Misspelt())


async def test_costs_survive_a_process_that_is_killed_before_it_could_write_them_at_its_end(path: Path) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)):
        assert json.loads(path.read_text())["tables"]


class OtherDevice(LengthPipeline):
    def device_name(self) -> str:
        return "abacus"


async def test_costs_of_another_device_are_not_taken_for_this_ones(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    OtherDevice.__qualname__ = LengthPipeline.__qualname__
    OtherDevice.__module__ = LengthPipeline.__module__
    async with InferenceWorker(OtherDevice(), settings=settings(path)):
        pass
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)):
        assert len(pipeline.batches) > 5
    assert "were measured on another device (abacus; this is" in caplog.text
    caplog.clear()
    for again in (LengthPipeline(), OtherDevice()):
        async with InferenceWorker(again, settings=settings(path)):
            assert len(again.batches) == 1
    assert not caplog.messages


async def test_models_and_their_entries_have_costs_of_their_own(path: Path) -> None:
    for pipeline in (LengthPipeline("a"), LengthPipeline("b"), LengthPipeline("b", max_length=5)):
        async with InferenceWorker(pipeline, settings=settings(path)):
            assert len(pipeline.batches) > 5
    assert len(json.loads(path.read_text())["tables"]) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 0, "tables": []}', '{"version": 1, "tables": [1, {}, {"key": {}}]}']
)
async def test_a_file_of_costs_that_is_none_is_replaced(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert len(pipeline.batches) > 5
    assert json.loads(path.read_text())["tables"][-1]["costs"]["observed"] > 5


def no_numbers(table: dict[str, Any]) -> None:
    table["costs"]["kept"]["vector"] = ["x"]


def endless(table: dict[str, Any]) -> None:
    table["costs"]["observed"] = float("inf")


def worthless(table: dict[str, Any]) -> None:
    for part in ("kept", "recent"):
        table["costs"][part]["vector"] = [-1.0] * 8


async def test_a_table_that_names_no_device_is_not_taken_for_this_ones(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)):
        pass
    content = json.loads(path.read_text())
    del content["tables"][0]["key"]["device"]
    path.write_text(json.dumps(content))
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)):
        assert len(pipeline.batches) > 5
    assert "measured on another device (None; this is" in caplog.text


@pytest.mark.parametrize("damage", [no_numbers, endless, worthless])
async def test_damaged_costs_are_measured_anew(
    path: Path, damage: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)):
        pass
    content = json.loads(path.read_text())
    damage(content["tables"][0])
    path.write_text(json.dumps(content))
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)):
        assert len(pipeline.batches) > 5
    assert "are damaged" in caplog.text


async def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    async with InferenceWorker(LengthPipeline(), settings=settings(tmp_path / "file" / "costs.json")) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert "cannot be kept" in caplog.text


class Failing(LengthPipeline):
    """Cannot run the larger ones of the items that it makes up."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if preprocessed_data["texts"][0].startswith("xxxxxxxxx"):
            raise ArithmeticError("made up")
        return super().predict(input_list, preprocessed_data)


class Unsized(LengthPipeline):
    def item_size(self, item: BaseModel) -> int:
        raise LookupError("no size")


class Sized(LengthPipeline):
    """Says that everything is of one size, right or wrong."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def item_size(self, item: BaseModel) -> int:
        return self.size  # type: ignore[return-value]  # that is the point


class Miscounting(LengthPipeline):
    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return super().sample_items(1, size)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        (Unsized(), "LookupError"),
        (Miscounting(), "sample_items"),
        (Sized(0), "item_size returned 0, which must be from 1"),
        (Sized(-5), "item_size returned -5, which must be from 1"),
        (Sized(10**200), "item_size returned a number of 665 bits"),
        (Sized(float("nan")), "ValueError"),
    ],
)
async def test_measuring_that_fails_is_a_warning_and_the_worker_serves(
    pipeline: LengthPipeline, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with InferenceWorker(pipeline, settings=settings()) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert "measuring batch costs ended early" in caplog.text
    assert reason in caplog.text


async def test_sizes_that_fail_are_told_and_not_taken_for_measured(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        pipeline = Failing()
        async with InferenceWorker(pipeline, settings=settings(path)) as worker:
            assert worker.costs.observed > 2, "smaller ones were measured"
        assert (
            "the costs of items of size 32 and more are not known, because one failed (ArithmeticError: made up)"
            in caplog.text
        )
        assert not path.exists()
        caplog.clear()


class Small(LengthPipeline):
    """Has no room for more than 100 characters, padding included."""

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        texts = preprocessed_data["texts"]
        if len(texts) > 1 and len(texts) * max(map(len, texts)) > 100:
            raise MemoryError
        return super().predict(input_list, preprocessed_data)


async def test_batches_out_of_memory_are_left_out_and_the_others_are_measured(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Small()
    async with InferenceWorker(pipeline, settings=settings(path)):
        pass
    shapes = {(len(texts), len(texts[0])) for texts in pipeline.batches}
    assert {(1, 8), (4, 8), (1, 32)} <= shapes
    assert not caplog.messages
    assert path.exists()


async def test_measuring_that_hangs_is_given_up_and_the_worker_serves(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    class Hanging(LengthPipeline):
        def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
            if len(preprocessed_data["texts"]) > 1:
                gate.wait(60)
            return super().predict(input_list, preprocessed_data)

    limits = {"calibration": {"max_seconds": 0.1}, "batch_timeout_seconds": 0.1}
    async with InferenceWorker(Hanging(), settings=Settings(app_settings={"batch_config": limits})) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
        gate.set()
    assert "ended early" in caplog.text
    assert "TimeoutError" in caplog.text
