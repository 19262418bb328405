"""The dedicated thread carries calls, errors and cancellation faithfully."""

import sys
import threading

import anyio
import pytest

from modalkit.batching.threads import DedicatedThread

pytestmark = pytest.mark.anyio


async def test_all_calls_run_in_one_thread_of_its_own() -> None:
    thread = DedicatedThread("worker")
    idents = {await thread.run(threading.get_ident) for _ in range(5)}
    assert len(idents) == 1
    assert threading.get_ident() not in idents
    thread.close()


async def test_an_error_reaches_the_caller_and_the_thread_goes_on() -> None:
    thread = DedicatedThread("worker")
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 / 0)
    assert await thread.run(lambda: 42) == 42
    thread.close()


async def test_a_function_that_exits_the_interpreter_only_fails_its_own_call() -> None:
    thread = DedicatedThread("worker")
    with pytest.raises(RuntimeError, match="raised SystemExit: 3"):
        await thread.run(lambda: sys.exit(3))
    assert await thread.run(lambda: 42) == 42
    thread.close()


async def test_a_cancelled_call_is_abandoned_and_counted_until_it_comes_back() -> None:
    thread = DedicatedThread("worker")
    started, release = anyio.Event(), threading.Event()
    loop_side = anyio.lowlevel.current_token()

    def hang() -> int:
        anyio.from_thread.run_sync(started.set, token=loop_side)
        release.wait()
        return threading.get_ident()

    async with anyio.create_task_group() as group:
        group.start_soon(thread.run, hang)
        await started.wait()
        group.cancel_scope.cancel()
    assert thread.stuck == 1
    hung = thread._abandoned[0]  # noqa: SLF001  # to join it
    assert await thread.run(threading.get_ident) != hung.ident
    release.set()
    await anyio.to_thread.run_sync(hung.join)
    assert thread.stuck == 0
    thread.close()


async def test_closing_twice_or_before_use_does_no_harm() -> None:
    thread = DedicatedThread("worker")
    thread.close()
    await thread.run(lambda: None)
    thread.close()
    thread.close()


def test_a_call_that_outlives_its_event_loop_ends_quietly() -> None:
    thread = DedicatedThread("worker")
    release = threading.Event()

    async def abandon_a_call() -> threading.Thread:
        with anyio.move_on_after(0):
            await thread.run(release.wait)
        return thread._abandoned[0]  # noqa: SLF001  # to join it

    hung = anyio.run(abandon_a_call)
    release.set()
    hung.join(timeout=30)
    assert not hung.is_alive()


async def test_where_no_thread_can_be_started_one_call_fails_and_the_next_one_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = DedicatedThread("worker")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)  # a limit of the system holds for root nowhere
        with pytest.raises(RuntimeError, match="can't start"):
            await thread.run(threading.get_ident)
    with anyio.fail_after(5):
        assert await thread.run(lambda: 42) == 42
    thread.close()
