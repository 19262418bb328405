"""An application with modalkit's routes below /models."""

from fastapi import FastAPI

from modalkit import LocalGateway, Settings, create_app, lifespan_of

settings = Settings.load()
models = create_app(LocalGateway(settings), auth=settings.app_settings.auth_config)
app = FastAPI(lifespan=lifespan_of(models))
app.mount("/models", models)
