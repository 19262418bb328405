"""vLLM's ``POST /classify``."""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from modalkit.service.gateway import Model
from modalkit.service.settings import KeyScope
from modalkit.service.web.adapters.tasks import CLASSIFICATION, MAX_TEXTS
from modalkit.service.web.admission import Admission
from modalkit.service.web.bodies import read_as
from modalkit.service.web.direct import DirectResponse
from modalkit.service.web.options import PredictionOptions
from modalkit.service.web.routes import RouteTable


class ClassificationRequest(BaseModel):
    """Texts to classify."""

    model_config = ConfigDict(extra="forbid")

    input: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
    model: str | None = Field(default=None, description="Which model; the first classifier if left out.")
    user: str | None = Field(default=None, description="Not used.")
    use_activation: Literal[True] | None = Field(default=None, description="The answer always has probabilities.")


class ClassificationData(BaseModel):
    """The class of one text."""

    index: int
    label: str
    probs: list[float] = Field(description="The probabilities of all labels, in the order of the model's labels.")
    num_classes: int


class UsageInfo(BaseModel):
    """Always 0: tokens are not counted."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0


class ClassificationResponse(BaseModel):
    """The classes of all texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassificationData]
    usage: UsageInfo = UsageInfo()


def add_vllm_routes(routes: RouteTable, models: Mapping[str, Model], admission: Admission) -> None:
    """Add the route, if there is a classifier."""
    if not CLASSIFICATION.models_of(models):
        return

    @routes.add(
        "/classify",
        KeyScope.PREDICT,
        ClassificationRequest,
        PredictionOptions,
        ClassificationResponse,
        summary="Classify texts, as vLLM does",
    )
    async def classify(request: Request) -> Response:
        if len(CLASSIFICATION.models_of(models)) == 1:  # else the body may name another
            await CLASSIFICATION.check_room(request, models, admission)
        asked = await read_as(ClassificationRequest, request)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        items = [{"text": text, "scores": True} for text in texts]
        name, outputs = await CLASSIFICATION.run(request, models, admission, items, asked.model)
        data = []
        for index, output in enumerate(outputs):
            scores: dict[str, float] = getattr(output, CLASSIFICATION.gives)
            probs = list(scores.values())
            label = max(scores, key=scores.__getitem__)
            data.append(ClassificationData(index=index, label=label, probs=probs, num_classes=len(probs)))
        answer = ClassificationResponse(
            id=f"classify-{uuid.uuid4().hex}", created=int(time.time()), model=name, data=data
        )
        return DirectResponse(to_json(answer))
