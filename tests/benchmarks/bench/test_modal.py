"""A class that is deployed on Modal is measured through Modal's own client, over a socket."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from modalkit.service.calls.in_process import InProcessEngine
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.service import ModalService
from modalkit.service.settings import Settings
from tests.benchmarks.bench.conftest import Bench
from tests.support.length_model import LengthPipeline
from tests.support.modal_server import as_modal_runs_it, serve_modal


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # Modal's client runs on no other
async def test_a_deployed_class_is_called_as_the_web_function_calls_it(
    bench: Bench, results: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(app_settings={"batch_config": {"calibration": {"enabled": False}}})

    class Model(ModalService):
        inference_implementation = LengthPipeline
        modal_utils = ModalConfig(settings, environ={})
        model_name = "lengths"

    engine = InProcessEngine()
    async with serve_modal(tmp_path, monkeypatch, engine) as server, engine, Model() as service:
        engine.attach("lengths", as_modal_runs_it(service))
        server.deploy_class("Model", max_concurrent_inputs=16)
        done = await anyio.to_thread.run_sync(partial(bench, "modal:app/Model", "--length-mix", "3", "--seconds", "2"))
        assert done.exit_code == 0, done.output
        document = results()
        missing = await anyio.to_thread.run_sync(partial(bench, "modal:app/Other", "--length-mix", "3"))
    (cell,) = document["cells"]
    assert document["target"] == "modal:app/Model"
    assert cell["answered"] > 0
    assert not cell["errors"]
    assert cell["limited"] == []
    assert missing.exit_code == 1
    assert "there is no class Other" in missing.output
