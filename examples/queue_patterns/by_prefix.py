"""A backend that chooses between two others, by a rule of its own."""

import anyio
from custom import TableBackend
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.task_queue import InMemoryBackend, QueueBackend


class ByPrefix:
    def __init__(self, urgent: QueueBackend, others: QueueBackend) -> None:
        self._urgent = urgent
        self._others = others

    async def send_message(self, queue_name: str, message: str) -> bool:
        backend = self._urgent if queue_name.startswith("urgent_") else self._others
        return await backend.send_message(queue_name, message)


async def main() -> None:
    queues = InMemoryBackend()
    backend = ByPrefix(queues, TableBackend())
    async with InferenceWorker(SquareRoot(), queue_backend=backend) as worker:
        await worker.submit(AsyncInputModel(message={"number": 9}, success_queue="urgent_roots"))
        await worker.submit(AsyncInputModel(message={"number": 16}, success_queue="roots"))
        print(await queues.receive("urgent_roots"))


anyio.run(main)
