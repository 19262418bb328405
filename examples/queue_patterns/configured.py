"""The queue that the configuration names: ``python configured.py modalkit.yaml sqs.yaml``."""

import sys

import anyio
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel
from modalkit.settings import Settings


async def main() -> None:
    settings = Settings.load(sys.argv[1:])
    async with InferenceWorker(SquareRoot("roots"), settings=settings) as worker:
        for number in (9, -1):
            await worker.submit(
                AsyncInputModel(message={"number": number}, success_queue="roots", failure_queue="errors")
            )


anyio.run(main)
