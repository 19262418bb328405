"""Volumes that change while a container serves."""

import threading
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.container import keep_volumes_fresh
from modalkit.service.settings import Settings
from tests.support.length_model import LengthPipeline
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


class Reloadable(ModalConfig):
    """Reloads what is no volume of Modal's: each time, what `reloads` says."""

    def __init__(self, *reloads: bool | Exception) -> None:
        super().__init__(Settings(), environ={})
        self.reloads = list(reloads)
        self.threads: list[int] = []

    def reload_volumes(self) -> bool:
        self.threads.append(threading.get_ident())
        reload = self.reloads.pop(0) if self.reloads else True
        if isinstance(reload, Exception):
            raise reload
        return reload


class Refreshed(LengthPipeline):
    """Counts how often it took up what is new, and raises as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures = failures
        self.refreshed: list[int] = []
        self.enough = threading.Event()

    def on_volume_reload(self) -> None:
        self.refreshed.append(threading.get_ident())
        if len(self.refreshed) >= 3:
            self.enough.set()
        if len(self.refreshed) <= self.failures:
            raise FileNotFoundError(str(Path("weights"))) if len(self.refreshed) > 1 else Panic("out of bounds")


async def refresh_three_times(config: ModalConfig, pipeline: Refreshed) -> None:
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(keep_volumes_fresh, config, pipeline, 0.001)
        assert await anyio.to_thread.run_sync(pipeline.enough.wait, 30)
        task_group.cancel_scope.cancel()


async def test_the_pipeline_takes_up_what_is_new_in_a_thread_of_its_own() -> None:
    config, pipeline = Reloadable(), Refreshed()
    await refresh_three_times(config, pipeline)
    assert threading.get_ident() not in {*config.threads, *pipeline.refreshed}


async def test_it_is_not_told_where_nothing_was_reloaded() -> None:
    config, pipeline = Reloadable(False, False), Refreshed()
    await refresh_three_times(config, pipeline)
    assert len(config.threads) >= len(pipeline.refreshed) + 2


async def test_what_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    await refresh_three_times(Reloadable(ConnectionError("Modal is away")), Refreshed(failures=2))
    assert caplog.text.count("could not take up what is new on the volumes") == 3
    assert "Modal is away" in caplog.text
    assert "Panic: out of bounds" in caplog.text
    assert "FileNotFoundError: weights" in caplog.text


async def test_other_tasks_go_on_while_it_reloads() -> None:
    gate, entered = threading.Event(), threading.Event()

    class Slow(Reloadable):
        def reload_volumes(self) -> bool:
            entered.set()
            return gate.wait(timeout=30)

    pipeline = Refreshed()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(keep_volumes_fresh, Slow(), pipeline, 0)
        while not entered.is_set():
            await anyio.lowlevel.checkpoint()  # this loop turns
        assert not pipeline.refreshed
        gate.set()
        assert await anyio.to_thread.run_sync(pipeline.enough.wait, 30)
        task_group.cancel_scope.cancel()
