"""The rivals do what they are taken for."""

import asyncio
import threading

import pytest

from modalkit.benchmarks.baselines import fixed_window, queue_and_thread, waiting_items

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Doubler:
    """Doubles numbers, and notes the batches and the threads."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()

    def run_batch(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        return [2 * item for item in items]


async def test_every_caller_of_the_bare_loop_gets_its_own_result() -> None:
    doubler = Doubler()
    async with queue_and_thread(doubler.run_batch, waiting_items(4)) as submit:
        assert await asyncio.gather(*map(submit, range(10))) == [2 * item for item in range(10)]
    assert doubler.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(doubler.threads) == 1
    assert threading.get_ident() not in doubler.threads


async def test_the_fixed_window_stays_open_until_the_batch_is_full() -> None:
    doubler = Doubler()
    async with queue_and_thread(doubler.run_batch, fixed_window(2, window_s=3600)) as submit:
        assert await asyncio.gather(*map(submit, range(4))) == [0, 2, 4, 6]
    assert doubler.batches == [[0, 1], [2, 3]]


async def test_the_fixed_window_closes_on_a_batch_with_room() -> None:
    doubler = Doubler()
    async with queue_and_thread(doubler.run_batch, fixed_window(32, window_s=0.0)) as submit:
        assert await asyncio.gather(*map(submit, [1, 2])) == [2, 4]
    assert doubler.batches == [[1, 2]]


async def test_a_failed_batch_ends_the_bare_loop_instead_of_leaving_its_callers_waiting() -> None:
    def fail(items: list[int]) -> list[int]:
        raise OSError("no disk")

    with pytest.raises(ExceptionGroup) as raised:
        async with queue_and_thread(fail, waiting_items(4)) as submit:
            await submit(1)
    assert raised.group_contains(OSError, match="no disk")
