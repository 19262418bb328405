"""The same without HTTP: a program that computes results and sends them to TaskIQ."""

import os
import sys

import anyio
from word_count import WordCount

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.task_queue import TaskIQBackend


async def main() -> None:
    backend = TaskIQBackend(os.environ.get("REDIS_URL", "redis://localhost:6379"))
    async with InferenceWorker(WordCount(), queue_backend=backend) as worker:
        for text in sys.argv[1:]:
            await worker.submit(AsyncInputModel(message={"text": text}, success_queue="word_counts"))
    await backend.aclose()


anyio.run(main)
