"""The thread of a store goes on whatever it is handed."""

from contextlib import nullcontext

import anyio
import pytest

from modalkit.service.jobs.operation_thread import OperationThread

pytestmark = pytest.mark.anyio


async def test_handing_over_nothing_does_not_end_the_thread() -> None:
    thread = OperationThread("t", lambda operations: [each(1) for each in operations], nullcontext, max_together=8)
    async with thread:
        thread._hand_over()  # noqa: SLF001  # what its event loop calls
        with anyio.fail_after(60):
            assert await thread.perform(lambda number: number + 1) == 2
