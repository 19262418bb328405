"""What tests of the Modal service share."""

import copy
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modalkit.service.calls.in_process import InProcessEngine
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
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
    async with InProcessEngine() as engine, serve_modal(tmp_path, monkeypatch, engine) as server:
        yield server


class Closable(InMemoryBackend):
    """A backend as a configuration names it."""

    made: list["Closable"] = []  # noqa: RUF012  # of the class, on purpose

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.made.append(self)

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture
def configured_backends() -> Iterator[list[Closable]]:
    Closable.made.clear()
    yield Closable.made
    Closable.made.clear()


CLOSABLE = {"backend": "tests.service.on_modal.conftest:Closable"}
