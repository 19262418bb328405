"""A queue backend that the program makes itself: here one in memory, which it also reads."""

import anyio
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.task_queue import InMemoryBackend


async def main() -> None:
    queues = InMemoryBackend()
    async with InferenceWorker(SquareRoot(), queue_backend=queues) as worker:
        for number in (9, -1):
            await worker.submit(
                AsyncInputModel(
                    message={"number": number},
                    success_queue="roots",
                    failure_queue="errors",
                    meta={"user_id": "ann"},
                )
            )
        print(await queues.receive("roots"))
        print(await queues.receive("errors"))


anyio.run(main)
