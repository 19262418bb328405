"""A context that is entered and left by other tasks than those that ask for it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from modalkit.service.on_modal.container import Lifetime

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Modal runs asyncio alone."""
    return "asyncio"


async def as_a_task(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a hook as Modal does."""
    return await asyncio.create_task(coroutine)


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_a_task_group_may_span_two_hooks() -> None:
    tasks: list[object] = []

    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        tasks.append(asyncio.current_task())
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(anyio.sleep_forever)
            yield
            tasks.append(asyncio.current_task())
            task_group.cancel_scope.cancel()

    lifetime = Lifetime(context())
    assert lifetime.is_over
    before = others()
    await as_a_task(lifetime.start())
    assert not lifetime.is_over
    assert await as_a_task(lifetime.stop(grace_s=60)) is True
    assert lifetime.is_over
    assert tasks[0] is tasks[1]
    assert others() == before


@pytest.mark.parametrize("error", [ZeroDivisionError("on entering"), asyncio.CancelledError("from inside")])
async def test_what_entering_raises_is_raised_by_start(error: BaseException) -> None:
    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        async with anyio.create_task_group():
            await anyio.lowlevel.checkpoint()
        raise error
        yield

    lifetime, before = Lifetime(context()), others()
    with pytest.raises(type(error), match=str(error)):
        await lifetime.start()
    assert lifetime.is_over
    assert others() == before
    assert await lifetime.stop(grace_s=60) is True


async def test_a_start_that_is_cancelled_leaves_what_it_entered() -> None:
    entering, left = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        try:
            entering.set()
            await anyio.sleep_forever()
            yield
        finally:
            left.set()

    lifetime, before = Lifetime(context()), others()
    start = asyncio.create_task(lifetime.start())
    await entering.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert left.is_set()
    assert others() == before


async def test_leaving_is_cut_short_after_the_grace() -> None:
    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        yield
        await anyio.sleep_forever()

    lifetime, before = Lifetime(context()), others()
    await lifetime.start()
    assert await lifetime.stop(grace_s=0) is False
    assert lifetime.is_over
    assert others() == before


async def test_an_error_on_leaving_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        yield
        raise ZeroDivisionError("on leaving")

    lifetime = Lifetime(context())
    await lifetime.start()
    assert await lifetime.stop(grace_s=60) is True
    assert "on leaving" in caplog.text


async def test_an_error_when_cut_short_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        yield
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError("while cut short")

    lifetime = Lifetime(context())
    await lifetime.start()
    assert await lifetime.stop(grace_s=0) is False
    assert "while cut short" in caplog.text


async def test_a_context_that_breaks_down_between_the_hooks_is_over(caplog: pytest.LogCaptureFixture) -> None:
    breaks = anyio.Event()

    async def breaking() -> None:
        await breaks.wait()
        raise ZeroDivisionError("in between")

    @asynccontextmanager
    async def context() -> AsyncIterator[None]:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(breaking)
            yield

    lifetime = Lifetime(context())
    await lifetime.start()
    (task,) = [task for task in others() if task.get_name() == "modalkit"]
    breaks.set()
    await asyncio.wait([task])
    assert lifetime.is_over
    assert await lifetime.stop(grace_s=60) is True
    assert "in between" in caplog.text
