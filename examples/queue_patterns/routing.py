"""Queues of different kinds: the first pattern that a queue's name matches says which."""

import anyio
from custom import TableBackend
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.task_queue import InMemoryBackend, RoutingBackend


async def main() -> None:
    queues = InMemoryBackend()
    backend = RoutingBackend({"urgent_*": queues, "*": TableBackend()})
    async with InferenceWorker(SquareRoot(), queue_backend=backend) as worker:
        await worker.submit(AsyncInputModel(message={"number": 9}, success_queue="urgent_roots"))
        await worker.submit(AsyncInputModel(message={"number": 16}, success_queue="roots"))
        print(await queues.receive("urgent_roots"))


anyio.run(main)
