"""An application with a lifespan and routes of its own, which use the same models as those below /models."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException

from modalkit import LocalGateway, QueueFullError, Settings, Success, create_app, lifespan_of

settings = Settings.load()
gateway = LocalGateway(settings)
models = create_app(gateway, auth=settings.app_settings.auth_config)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with lifespan_of(models)(app):  # leaving it finishes what was accepted
        await gateway.wait_until_ready()  # or serve other routes while the models load: then NotReadyError is raised
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/models", models)


@app.post("/longest")
async def longest(texts: list[str]) -> str:
    words = gateway.models["words"]
    try:
        outcomes = await words.predict_many([words.input_model(text=text) for text in texts], timeout_s=5)
    except QueueFullError as error:
        raise HTTPException(429, str(error)) from error
    counts = [outcome.value.model_dump()["words"] if isinstance(outcome, Success) else 0 for outcome in outcomes]
    return max(zip(counts, texts, strict=True))[1]
