"""The queue in memory, which users test with."""

import sys

import anyio
import anyio.lowlevel
import pytest

from modalkit.service.queue_backends import InMemoryBackend, QueueBackend, QueueEmptyError

pytestmark = pytest.mark.anyio


async def test_messages_are_kept_in_order_and_by_queue() -> None:
    backend = InMemoryBackend()
    for n in range(3):
        assert await backend.send_message("b", f"{n}")
    assert await backend.send_message("a", "x")
    assert backend.queue_names() == ["a", "b"]
    assert backend.messages("b") == ["0", "1", "2"]
    assert (backend.depth("b"), backend.depth("nothing"), backend.messages("nothing")) == (3, 0, [])
    assert [backend.receive_nowait("b"), await backend.receive("b")] == ["0", "1"]
    assert backend.messages("b") == ["2"]
    backend.clear()
    assert backend.queue_names() == []
    with pytest.raises(QueueEmptyError, match="'b' is empty"):
        backend.receive_nowait("b")


async def test_a_full_queue_drops_its_oldest_message_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = InMemoryBackend(max_messages_per_queue=2)
    assert all([await backend.send_message("a", f"{n}") for n in range(5)])
    assert await backend.send_message("b", "another queue")
    assert backend.messages("a") == ["3", "4"]
    assert [record.getMessage() for record in caplog.records] == [
        "Queue 'a' in memory is full: from now on its oldest messages are dropped"
    ]
    with pytest.raises(ValueError, match="max_messages_per_queue must be at least 1, got 0"):
        InMemoryBackend(0)


async def test_one_queue_too_many_drops_the_one_not_sent_to_for_longest(caplog: pytest.LogCaptureFixture) -> None:
    backend = InMemoryBackend(max_queues=2)
    for name in ("a", "b", "a", "c", "d"):
        await backend.send_message(name, "x")
    assert backend.queue_names() == ["c", "d"]
    assert caplog.text.count("more than 2 queues") == 1
    with pytest.raises(ValueError, match="max_queues"):
        InMemoryBackend(max_queues=0)


async def test_queues_that_were_read_to_their_end_take_no_place_of_others() -> None:
    backend = InMemoryBackend(max_queues=2)
    await backend.send_message("kept", "x")
    for n in range(5):
        await backend.send_message(f"reply-{n}", "x")
        assert backend.receive_nowait(f"reply-{n}") == "x"
    assert backend.messages("kept") == ["x"]


async def test_all_messages_together_take_a_bounded_number_of_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """Those of the queue that was not sent to for longest are dropped first, and never the newest one."""
    size = sys.getsizeof("x" * 1000)
    backend = InMemoryBackend(max_bytes=3 * size)
    for name in ("a", "b", "a", "b", "b"):
        await backend.send_message(name, "x" * 1000)
    assert (backend.depth("a"), backend.depth("b")) == (0, 3)
    backend.receive_nowait("b")
    await backend.send_message("c", "x" * 1000)
    assert (backend.depth("b"), backend.depth("c")) == (2, 1)
    await backend.send_message("c", "y" * 9000)
    assert {name: backend.messages(name) for name in backend.queue_names()} == {"c": ["y" * 9000]}
    backend.clear()
    for number in range(5):
        await backend.send_message("d", f"{number}" * 1000)
    assert [message[0] for message in backend.messages("d")] == ["2", "3", "4"]
    assert caplog.text.count("old messages are dropped now") == 1
    with pytest.raises(ValueError, match="max_bytes"):
        InMemoryBackend(max_bytes=0)


async def test_receivers_wait_and_each_message_goes_to_one_of_them() -> None:
    backend, received = InMemoryBackend(), list[str]()

    async def receive() -> None:
        received.append(await backend.receive("a"))

    async with anyio.create_task_group() as task_group:
        for _ in range(3):
            task_group.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        for n in range(3):
            await backend.send_message("a", f"{n}")
    assert sorted(received) == ["0", "1", "2"]
    assert backend.depth("a") == 0


async def test_a_receiver_cancelled_as_its_message_comes_leaves_it_for_the_next() -> None:
    backend, received = InMemoryBackend(), list[str]()

    async def receive() -> None:
        received.append(await backend.receive("a"))

    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as first:
            first.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            others.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            await backend.send_message("a", "x")
            first.cancel_scope.cancel()
        # Event loops differ in whether the first receiver still gets it; either way, nothing is lost.
        await backend.send_message("a", "y")
    assert received + backend.messages("a") == ["x", "y"]


async def test_a_receiver_that_is_cancelled_leaves_the_others_waiting() -> None:
    backend, received = InMemoryBackend(), list[str]()

    async def receive() -> None:
        received.append(await backend.receive("a"))

    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as first:
            first.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            others.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        await anyio.wait_all_tasks_blocked()
        await backend.send_message("a", "x")
    assert received == ["x"]


def test_a_receiver_cancelled_in_one_event_loop_is_no_matter_to_the_next(anyio_backend_name: str) -> None:
    backend = InMemoryBackend()

    async def give_up() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(backend.receive, "a")
            await anyio.wait_all_tasks_blocked()
            task_group.cancel_scope.cancel()

    async def send_to_receiver() -> None:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(backend.send_message, "a", "x")
            assert await backend.receive("a") == "x"

    anyio.run(give_up, backend=anyio_backend_name)
    anyio.run(send_to_receiver, backend=anyio_backend_name)


def test_any_object_with_the_method_is_a_backend() -> None:
    class Mine:
        async def send_message(self, queue_name: str, message: str) -> bool:
            return True

    assert isinstance(Mine(), QueueBackend)
    assert not isinstance(object(), QueueBackend)
