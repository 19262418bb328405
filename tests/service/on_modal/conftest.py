"""What tests of the Modal service share."""

import copy
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.service import ModalService
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from tests.support.length_model import LengthPipeline
from tests.support.modal_in_process import ModalInProcess
from tests.support.modal_server import ModalServer, serve_modal

MakeConfig = Callable[..., ModalConfig]

_QUICK: dict[str, Any] = {"batch_config": {"calibration": {"enabled": False}}}


@pytest.fixture
def make_config() -> MakeConfig:
    """Makes a configuration from sections of the app's settings, ``deployment_config={"retries": 0}`` say."""

    def make(model_settings: dict[str, Any] | None = None, **sections: dict[str, Any]) -> ModalConfig:
        app_settings = copy.deepcopy(_QUICK)
        for name, values in sections.items():
            app_settings[name] = app_settings.get(name, {}) | values
        given: dict[str, Any] = {"app_settings": app_settings}
        if model_settings is not None:
            given["model_settings"] = model_settings
        return ModalConfig(Settings(**given), environ={})

    return make


@pytest.fixture
async def modal_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModalServer]:
    """A server of this test's, which Modal's client takes for Modal's."""
    async with serve_modal(tmp_path, monkeypatch) as server:
        yield server


class _LengthService(ModalService):
    inference_implementation = LengthPipeline
    model_name = "lengths"


@pytest.fixture
async def calls(make_config: MakeConfig) -> AsyncIterator[ModalInProcess]:
    """A service that measures texts in one container, whose queue is in memory, and what makes calls of it."""
    service = _LengthService(queue_backend=InMemoryBackend())
    service.modal_utils = make_config(queue_config={"allowed_queues": ["ok", "bad"]})
    async with service, ModalInProcess(service) as calls:
        yield calls
