"""FastAPI without batching: each request runs the model by itself. Also jobs by its ``BackgroundTasks``."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import BackgroundTasks, FastAPI
from pydantic import BaseModel

from modalkit.benchmarks.peers.settings import Settings

models: list[Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = []
finished: list[str] = []


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Load the model, once in each worker; their parent does not import torch."""
    from modalkit.benchmarks.peers.servers.pipeline import Model

    models.append(Model(Settings.from_variable()))
    yield


class TextRequest(BaseModel):
    """What a request has; the pipeline validates more."""

    text: str


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
def predict(request: TextRequest) -> dict[str, Any]:
    """Answer one request, in a thread of the pool."""
    return models[0]([request.model_dump()])[0]


@app.post("/predict-async")
async def predict_in_the_event_loop(request: TextRequest) -> dict[str, Any]:
    """Answer one request, which blocks the event loop: no two compute at once."""
    return models[0]([request.model_dump()])[0]


@app.post("/jobs", status_code=202)
def submit(request: TextRequest, background: BackgroundTasks) -> dict[str, str]:
    """Run the model after the answer."""
    background.add_task(lambda: finished.append(predict(request)["sentiment"]))
    return {"status": "accepted"}


@app.get("/jobs")
def count() -> int:
    """How many jobs are done."""
    return len(finished)


if __name__ == "__main__":
    settings = Settings.from_variable()
    uvicorn.run(
        "modalkit.benchmarks.peers.servers.fastapi_server:app",
        port=settings.port,
        workers=settings.workers,
        access_log=False,
    )
