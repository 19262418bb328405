"""The routes of Text Embeddings Inference (TEI): ``/predict``, ``/embed``, ``/rerank`` and ``POST /``.

A body of ``/predict`` with `parameters` is that of Hugging Face's Inference API, which `InferenceClient` sends.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.gateway import Model
from modalkit.service.outputs import part_json
from modalkit.service.settings import KeyScope
from modalkit.service.web.adapters.tasks import CLASSIFICATION, EMBEDDING, MAX_TEXTS, RERANKING, Task
from modalkit.service.web.admission import Admission
from modalkit.service.web.bodies import read_as
from modalkit.service.web.direct import DirectResponse, list_response
from modalkit.service.web.options import PredictionOptions
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.routes import Endpoint, RouteTable

Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]

OneText = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    truncate: bool | None = Field(
        default=None, description="False refuses texts that are longer than the model's limit, with 413."
    )
    truncation_direction: Literal["right", "Right"] | None = Field(default=None, description="Ends are cut.")


class Parameters(BaseModel):
    """The parameters of Hugging Face's Inference API."""

    model_config = ConfigDict(extra="forbid")

    top_k: PositiveInt | None = Field(default=None, description="Only the most probable labels.")


class PredictRequest(_Request):
    """Texts to classify."""

    inputs: str | OneText | Annotated[list[OneText], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)] = Field(
        description="A text, or a list of lists with one text each."
    )
    raw_scores: Literal[False] = Field(default=False, description="Scores are probabilities.")
    parameters: Parameters | None = Field(
        default=None, description="Where it is given, the answer is a list of lists also for a single text."
    )

    @field_validator("inputs", mode="before")
    @classmethod
    def _no_pair(cls, value: object) -> object:
        if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str):
            raise ValueError('texts in one list are a pair, which no model here reads: send [["one"], ["two"]]')
        return value


class Prediction(BaseModel):
    """A label and its probability."""

    label: str
    score: float


class EmbedRequest(_Request):
    """Texts to embed."""

    inputs: str | Texts
    normalize: Literal[True] | None = Field(
        default=None, description="Vectors of length 1; null: as the model is configured."
    )


class RerankRequest(_Request):
    """Texts to sort by how well they answer a query."""

    query: str
    texts: Texts
    raw_scores: Literal[False] = Field(default=False, description="Scores are as the model is configured.")
    return_text: bool = Field(default=False, description="Whether the answer has the texts.")


class Rank(BaseModel):
    """A text, by its index, and its score."""

    index: int
    score: float
    text: str | None = None


def add_tei_routes(routes: RouteTable, models: Mapping[str, Model], admission: Admission) -> None:
    """Add the routes for which there is a model, and ``POST /``, which is the first of them."""

    async def tei_predict(request: Request) -> Response:
        await CLASSIFICATION.check_room(request, models, admission)
        asked = await read_as(PredictRequest, request)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        items = [{"text": text if isinstance(text, str) else text[0], "scores": True} for text in texts]
        _, outputs = await CLASSIFICATION.run(request, models, admission, items)
        _check_length(asked, outputs)
        top_k = None if asked.parameters is None else asked.parameters.top_k

        def write(output: InferenceOutputModel) -> bytes:
            return part_json(_sorted_labels(getattr(output, CLASSIFICATION.gives))[:top_k])

        answers = await admission.map(partial(map, write), outputs)
        is_single = asked.parameters is None and isinstance(texts[0], str)
        return DirectResponse(answers[0]) if is_single else list_response(answers)

    async def tei_embed(request: Request) -> Response:
        await EMBEDDING.check_room(request, models, admission)
        asked = await read_as(EmbedRequest, request)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        _, outputs = await EMBEDDING.run(request, models, admission, [{"text": text} for text in texts])
        _check_length(asked, outputs)

        def write(output: InferenceOutputModel) -> bytes:
            vector: list[float] = getattr(output, EMBEDDING.gives)
            return part_json(_normalized(vector) if asked.normalize else vector)

        return list_response(await admission.map(partial(map, write), outputs))

    async def tei_rerank(request: Request) -> Response:
        await RERANKING.check_room(request, models, admission)
        asked = await read_as(RerankRequest, request)
        items = [{"query": asked.query, "text": text} for text in asked.texts]
        _, outputs = await RERANKING.run(request, models, admission, items)
        _check_length(asked, outputs)
        ranks: list[dict[str, Any]] = [
            {"index": index, "score": getattr(output, RERANKING.gives)}
            | ({"text": asked.texts[index]} if asked.return_text else {})
            for index, output in enumerate(outputs)
        ]
        return DirectResponse(part_json(sorted(ranks, key=lambda rank: rank["score"], reverse=True)))

    known: list[tuple[Task, str, type[BaseModel], Any, Endpoint]] = [
        (CLASSIFICATION, "/predict", PredictRequest, list[Prediction] | list[list[Prediction]], tei_predict),
        (EMBEDDING, "/embed", EmbedRequest, list[list[float]], tei_embed),
        (RERANKING, "/rerank", RerankRequest, list[Rank], tei_rerank),
    ]
    fitting = [added for added in known if added[0].models_of(models)]
    for task, path, body, answer, endpoint in fitting:
        summary = f"{task.name.capitalize()}, as by Text Embeddings Inference"
        routes.add(path, KeyScope.PREDICT, body, PredictionOptions, answer, summary=summary)(endpoint)
    for _, _, body, answer, endpoint in fitting[:1]:
        routes.add("/", KeyScope.PREDICT, body, PredictionOptions, answer, include_in_schema=False)(endpoint)


def _check_length(asked: _Request, outputs: Sequence[InferenceOutputModel]) -> None:
    """Raise `ProblemError` for a text that was cut against the caller's will."""
    if asked.truncate is False and any(getattr(output, "truncated", False) for output in outputs):
        raise ProblemError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "truncate: false, and a text is longer than the model's limit; send less of it, or leave truncate out",
        )


def _sorted_labels(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    best_first = sorted(scores.items(), key=lambda entry: entry[1], reverse=True)
    return [{"label": label, "score": score} for label, score in best_first]


def _normalized(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]
