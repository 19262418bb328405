"""Which models an adapter can use, and how it runs their items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from modalkit.batching import Failure
from modalkit.batching.errors import raise_anew
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.gateway import Model, find_model
from modalkit.service.validation import validated
from modalkit.service.web.admission import Admission
from modalkit.service.web.auth import caller_of
from modalkit.service.web.bodies import check_count
from modalkit.service.web.direct import while_connected
from modalkit.service.web.options import PredictionOptions
from modalkit.service.web.problems import ProblemError

MAX_TEXTS = 4096
"""Limit of the texts in one request to an adapter."""


@dataclass(frozen=True, slots=True)
class Task:
    """What models are asked to do. A model fits whose items have the fields `takes`, and its outputs the field `gives`.

    So a pipeline of a user's own fits by its `input_model` and its `output_model`.
    """

    name: str
    takes: frozenset[str]
    gives: str

    def models_of(self, models: Mapping[str, Model]) -> dict[str, Model]:
        """Those of these models that fit."""
        return {
            name: model
            for name, model in models.items()
            if self.takes <= model.input_model.model_fields.keys() and self.gives in model.output_model.model_fields
        }

    async def check_room(self, request: Request, models: Mapping[str, Model], admission: Admission) -> None:
        """Raise what a request should be refused with before its body is read, as far as that is known.

        Raises `ProblemError`, and what `Model.check_room` raises for the model that the query names, or the first that
        fits.
        """
        options, caller = PredictionOptions.of(request), caller_of(request)
        model = self._find(models, options.model_name)
        caller.take_items(0)
        await admission.check(model.check_room, **options.for_owner(caller.owner))

    def _find(self, models: Mapping[str, Model], name: str | None) -> Model:
        fitting = self.models_of(models)
        model = find_model(fitting if name is None else models, name)
        if model.name not in fitting:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"model {model.name!r} does not fit {self.name}; those that do: {', '.join(fitting)}",
            )
        return model

    async def run(
        self,
        request: Request,
        models: Mapping[str, Model],
        admission: Admission,
        items: Sequence[Mapping[str, Any]],
        model_name: str | None = None,
    ) -> tuple[str, list[InferenceOutputModel]]:
        """Run items on the model of this name, or the one that the request's query names, or the first that fits.

        Returns the model's name and the outputs. Raises `ProblemError` for a model that does not fit, and the first
        error of an item.
        """
        options, caller = PredictionOptions.of(request), caller_of(request)
        model = self._find(models, model_name or options.model_name)
        caller.take_items(0)
        model.check_room(**options.for_owner(caller.owner))
        check_count(len(items), admission.limits)

        def validate(some: Sequence[Mapping[str, Any]]) -> list[BaseModel]:
            return [validated(model.input_model, item) for item in some]

        valid = await admission.map(validate, items)
        caller.take_items(len(valid))
        call = model.predict_many(valid, **options.for_owner(caller.owner))
        outputs = []
        for outcome in await while_connected(request, call):
            if isinstance(outcome, Failure):
                raise_anew(outcome.error)
            outputs.append(outcome.value)
        return model.name, outputs


CLASSIFICATION = Task("text classification", frozenset({"text", "scores"}), "scores")
EMBEDDING = Task("embedding", frozenset({"text"}), "embedding")
RERANKING = Task("reranking", frozenset({"query", "text"}), "score")
