"""What is written comes out in order, and mostly lies on disk."""

import anyio
import pytest

from modalkit.service.settings import RequestConfig
from modalkit.service.web.admission import FREE_BYTES, Admission, Reception
from modalkit.service.web.lines import SPOOL_CHUNK_BYTES, SPOOL_MEMORY_BYTES, Spool

pytestmark = pytest.mark.anyio


async def read_all(spool: Spool) -> bytes:
    found = b""
    while chunk := await spool.read():
        assert len(chunk) <= max(SPOOL_CHUNK_BYTES, SPOOL_MEMORY_BYTES)
        found += chunk
    return found


async def test_a_reader_gets_everything_in_order_and_then_the_end() -> None:
    with Spool() as spool:
        spool.write(b"one")
        assert await spool.read() == b"one"
        spool.write(b"two")
        spool.write(b"three")
        spool.close()
        assert await read_all(spool) == b"twothree"
        assert await spool.read() == b""


async def test_a_reader_waits_for_a_writer() -> None:
    found: list[bytes] = []
    with Spool() as spool:

        async def read() -> None:
            found.append(await read_all(spool))

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(read)
            for part in (b"a", b"b", b"c"):
                await anyio.wait_all_tasks_blocked()
                spool.write(part)
            spool.close()
    assert found == [b"abc"]


async def test_more_than_fits_in_memory_is_kept_on_disk() -> None:
    parts = [bytes([n]) * 100_000 for n in range(50)]
    with Spool() as spool:
        for part in parts:
            spool.write(part)
        assert spool._parts_bytes <= SPOOL_MEMORY_BYTES  # noqa: SLF001  # the others lie in a file
        spool.close()
        assert len(b"".join(parts)) > SPOOL_MEMORY_BYTES
        assert await read_all(spool) == b"".join(parts)


async def test_what_is_read_ahead_is_held_and_is_less_where_requests_hold_much() -> None:
    admission = Admission(RequestConfig(max_pending_bytes=FREE_BYTES))
    with Spool(10 * FREE_BYTES, 20 * FREE_BYTES, Reception(admission)) as spool:
        spool.write(bytes(FREE_BYTES + 1))
        assert admission.held_bytes == 1
        await spool.wait_for_room()
        Reception(admission).hold(2 * FREE_BYTES)  # another request
        has_room = anyio.Event()

        async def wait_for_room() -> None:
            await spool.wait_for_room()
            has_room.set()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(wait_for_room)
            await anyio.wait_all_tasks_blocked()
            assert not has_room.is_set()
            assert len(await spool.read()) == FREE_BYTES + 1
    assert admission.held_bytes == FREE_BYTES
