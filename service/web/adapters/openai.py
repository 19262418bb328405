"""OpenAI's list of models: ``GET /v1/models`` and ``GET /v1/models/{model}``."""

import time
from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from modalkit.service.gateway import Model, find_model
from modalkit.service.web.answers import PROBLEM_ANSWERS


class ListedModel(BaseModel):
    """A model."""

    id: str = Field(description="The name that `?model_name=` takes.")
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds: when this process began to serve the model.")
    owned_by: Literal["modalkit"] = "modalkit"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


def make_models_router(models: Mapping[str, Model]) -> APIRouter:
    """The routes that show `models`."""
    router = APIRouter(tags=["OpenAI"], responses=PROBLEM_ANSWERS)
    created = int(time.time())

    @router.get("/v1/models", summary="List the models")
    async def openai_list_models() -> ModelList:
        return ModelList(data=[ListedModel(id=name, created=created) for name in models])

    @router.get("/v1/models/{model:path}", summary="One model")
    async def openai_get_model(model: str) -> ListedModel:
        return ListedModel(id=find_model(models, model).name, created=created)

    return router
