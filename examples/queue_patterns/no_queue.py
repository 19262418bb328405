"""No queue: results stay in the job store, where the program that submitted the jobs reads them by their ids."""

import anyio
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel


async def main() -> None:
    async with InferenceWorker(SquareRoot()) as worker:
        job_ids = [await worker.submit(AsyncInputModel(message={"number": number})) for number in (9, -1)]
        for job_id in job_ids:
            if job := await worker.job(job_id, wait_s=10):
                print(job.status, job.result["root"] if job.result else job.error)


anyio.run(main)
