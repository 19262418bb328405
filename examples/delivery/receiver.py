"""Takes results as webhooks: ``uvicorn receiver:app --port 9000``."""

import os
import sqlite3
from contextlib import closing

from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request
from once import TABLES, handle

from modalkit.task_queue import WebhookVerificationError, verify_webhook

app = FastAPI()


@app.post("/results", status_code=204)
async def take_result(request: Request) -> None:
    body = await request.body()
    try:
        verify_webhook(os.environ["WEBHOOK_SECRET"], request.headers, body)
    except WebhookVerificationError as error:
        raise HTTPException(401, str(error)) from error
    await to_thread.run_sync(store, body.decode())


def store(message: str) -> None:
    with closing(sqlite3.connect("results.db")) as database:
        database.executescript(TABLES)
        handle(database, message)
