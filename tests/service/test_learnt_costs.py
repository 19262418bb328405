"""What batches cost is measured at start, kept between starts, and never worth failing for."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from service.settings import Settings
from service.worker import InferenceWorker
from tests.support.length_model import Length, LengthPipeline, Text

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
        assert worker.statistics().batches == 0, "what is measured is nobody's request"
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
    "content", ["", "{", "[]", '{"version": 0, "tables": []}', '{"version": 1, "tables": [1, {}]}']
)
async def test_a_file_of_costs_that_is_none_is_replaced(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    pipeline = LengthPipeline()
    async with InferenceWorker(pipeline, settings=settings(path)) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert len(pipeline.batches) > 5
    assert len(json.loads(path.read_text())["tables"]) == 1


async def test_damaged_costs_are_measured_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with InferenceWorker(LengthPipeline(), settings=settings(path)):
        pass
    content = json.loads(path.read_text())
    content["tables"][0]["costs"]["kept"]["vector"] = ["x"]
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


class Miscounting(LengthPipeline):
    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return super().sample_items(1, size)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [(Failing(), "ArithmeticError: made up"), (Unsized(), "LookupError"), (Miscounting(), "sample_items")],
)
async def test_measuring_that_fails_is_a_warning_and_the_worker_serves(
    pipeline: LengthPipeline, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with InferenceWorker(pipeline, settings=settings()) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
    assert "measuring what batches cost ended early" in caplog.text
    assert reason in caplog.text


async def test_measuring_that_hangs_is_given_up_and_the_worker_serves(caplog: pytest.LogCaptureFixture) -> None:
    door = threading.Event()

    class Hanging(LengthPipeline):
        def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
            if len(preprocessed_data["texts"]) > 1:
                door.wait(60)
            return super().predict(input_list, preprocessed_data)

    limits = {"calibration": {"max_seconds": 0.1}, "batch_timeout_seconds": 0.1}
    async with InferenceWorker(Hanging(), settings=Settings(app_settings={"batch_config": limits})) as worker:
        assert await worker.predict(Text(text="four")) == Length(length=4)
        door.set()
    assert "ended early (TimeoutError" in caplog.text
