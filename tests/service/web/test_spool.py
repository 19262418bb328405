"""What is written comes out in order, and mostly lies on disk."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import pytest
from starlette.types import Message

from modalkit.service.settings import RequestConfig
from modalkit.service.web.admission import FREE_BYTES, Admission, Reception
from modalkit.service.web.lines import SPOOL_CHUNK_BYTES, SPOOL_MEMORY_BYTES, Lines, LineStream, Spool

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


@contextmanager
def small_files(size_bytes: int) -> Iterator[None]:
    """No file grows beyond this size, as where the disk is full: what fits is still written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_reader_gets_an_error_where_the_disk_is_full_and_never_less_than_was_written() -> None:
    part = bytes(SPOOL_MEMORY_BYTES + 1)
    with Spool() as spool:
        with small_files(len(part) + 100):
            spool.write(part)
            spool.write(part)
        spool.close()
        with pytest.raises(OSError, match="too large"):
            await read_all(spool)


async def test_answers_that_the_disk_has_no_room_for_end_the_connection() -> None:
    sent: list[Message] = []
    never = anyio.Event()

    async def receive() -> Message:
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def answer(lines: Lines, write: Callable[[bytes], None]) -> None:  # as `Answer` has it
        with small_files(100):
            write(bytes(SPOOL_MEMORY_BYTES + 1))

    with pytest.raises(BaseExceptionGroup) as raised:
        await LineStream(answer, Admission())({"type": "http"}, receive, send)
    assert raised.group_contains(OSError, match="too large")
    assert sent == []
