"""The callers, in virtual time."""

from typing import Any

import anyio
import pytest

from modalkit.benchmarks.drivers import open_loop, timed_s, work_off

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(virtual_time: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    return virtual_time


class Server:
    """Takes as many seconds for an item as the item says, for all items at once."""

    def __init__(self) -> None:
        self.under_way = self.most_under_way = 0
        self.arrivals: list[tuple[float, float]] = []

    async def call(self, seconds: float) -> None:
        self.arrivals.append((anyio.current_time(), seconds))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await anyio.sleep(seconds)
        self.under_way -= 1


async def test_a_closed_loop_sends_the_next_item_once_one_is_answered() -> None:
    server = Server()
    await work_off([server.call] * 2, [3, 1, 1, 1, 5])
    assert server.arrivals == [(0, 3), (0, 1), (1, 1), (2, 1), (3, 5)]


async def test_a_closed_loop_keeps_all_its_callers_busy() -> None:
    server = Server()
    assert await timed_s(work_off([server.call] * 8, [2.0] * 80)) == 20
    assert server.most_under_way == 8
    assert len(server.arrivals) == 80


async def test_each_caller_of_a_closed_loop_uses_its_own_connection() -> None:
    one, other = Server(), Server()
    await work_off([one.call, other.call], [2.0, 1.0, 1.0])
    assert sorted([len(one.arrivals), len(other.arrivals)]) == [1, 2]


async def test_an_open_loop_sends_on_time_whatever_became_of_the_others() -> None:
    server = Server()
    latencies_s = await open_loop(server.call, [100, 1, 1], [0.5, 1, 7.25])
    assert server.arrivals == [(0.5, 100), (1, 1), (7.25, 1)]
    assert sorted(latencies_s) == [1, 1, 100]


async def test_an_open_loop_counts_from_when_an_item_was_due() -> None:
    late_s = await open_loop(Server().call, [4], [-2])
    assert late_s == [6], "it was due two seconds before it could be sent"


async def test_a_failed_call_ends_the_measurement() -> None:
    async def refuse(item: int) -> None:
        raise ConnectionError(f"no answer to {item}")

    with pytest.raises(ExceptionGroup) as raised:
        await work_off([refuse], [7])
    assert raised.group_contains(ConnectionError, match="no answer to 7")
