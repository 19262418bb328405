"""A queue backend of one's own: a table in a database."""

import json
import os
import sqlite3
from contextlib import closing

import anyio
from anyio import to_thread
from square_root import SquareRoot

from modalkit import InferenceWorker
from modalkit.iomodel import AsyncInputModel


class TableBackend:
    """Puts each message into a table. One that comes a second time changes nothing, because job_id is the key."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path or os.environ.get("RESULTS_DB", "results.db")

    async def send_message(self, queue_name: str, message: str) -> bool:
        await to_thread.run_sync(self._insert, queue_name, message)
        return True

    def _insert(self, queue_name: str, message: str) -> None:
        with closing(sqlite3.connect(self._path)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS results (job_id TEXT PRIMARY KEY, queue TEXT, message TEXT)")
            row = (json.loads(message)["job_id"], queue_name, message)
            database.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", row)


async def main() -> None:
    async with InferenceWorker(SquareRoot(), queue_backend=TableBackend()) as worker:
        await worker.submit(AsyncInputModel(message={"number": 9}, success_queue="roots"))


if __name__ == "__main__":  # the configuration imports this module too
    anyio.run(main)
