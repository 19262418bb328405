"""A queue that is away: jobs run all the same, and their results get there once it is back."""

import anyio
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.task_queue import InMemoryBackend, QueueBackend


class Unsteady:
    """Hands messages on to another backend, except while it is away."""

    def __init__(self, backend: QueueBackend) -> None:
        self._backend = backend
        self.is_away = True

    async def send_message(self, queue_name: str, message: str) -> bool:
        if self.is_away:
            raise ConnectionError("the queue does not answer")
        return await self._backend.send_message(queue_name, message)


async def main() -> None:
    queues = InMemoryBackend()
    backend = Unsteady(queues)
    async with InferenceWorker(SquareRoot(), queue_backend=backend) as worker:
        job_id = await worker.submit(AsyncInputModel(message={"number": 9}, success_queue="roots"))
        if job := await worker.job(job_id, wait_s=10):
            print(job.status, job.result, job.delivery)
        print(await worker.predict({"number": 16}))
        backend.is_away = False
        print(await queues.receive("roots"))


anyio.run(main)
