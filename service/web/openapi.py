"""Adds to the OpenAPI schema what FastAPI does not see: the bodies and problem details of the routes."""

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from modalkit.pipelines import AsyncInputModel, AsyncOutputModel
from modalkit.service.gateway import Model
from modalkit.service.web.answers import (
    JSON,
    NDJSON,
    PROBLEM_JSON,
    JobDetails,
    JobPageView,
    Problem,
    Purged,
    Replayed,
    Submitted,
)

_ANSWERS: dict[str, type[BaseModel]] = {
    "get_job": JobDetails,
    "cancel_job": JobDetails,
    "replay_job": JobDetails,
    "list_jobs": JobPageView,
    "replay_jobs": Replayed,
    "purge_jobs": Purged,
}
_REF = "#/components/schemas/{model}"


def document_bodies(app: FastAPI, models: Collection[Model]) -> None:
    """Add the schemas of bodies and answers to the operations of `app`, which are found by their operation ids."""
    inputs = list(dict.fromkeys(model.input_model for model in models))
    outputs = list(dict.fromkeys(model.output_model for model in models))
    jobs: list[type[BaseModel]] = [AsyncInputModel[model] for model in inputs]  # type: ignore[valid-type]  # classes known at run time
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in (*inputs, *jobs)]
    answers: list[type[BaseModel]] = [*outputs, AsyncOutputModel, *_ANSWERS.values(), Submitted, Problem]
    modes += [(model, "serialization") for model in answers]
    refs, definitions = models_json_schema(modes, ref_template=_REF)

    def any_of(models: Sequence[type[BaseModel]], mode: JsonSchemaMode) -> dict[str, Any]:
        schemas = [refs[model, mode] for model in models]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    item, job = any_of(inputs, "validation"), any_of(jobs, "validation")
    output = any_of(outputs, "serialization")
    bodies: dict[str, tuple[dict[str, Any] | None, str, dict[str, Any]]] = {
        "sync_predict": (item, "200", output),
        "batch_predict": (_list_of(item), "200", _list_of(output)),
        "async_predict": (
            {"anyOf": [job, _list_of(job)]},
            "202",
            {"anyOf": [refs[AsyncOutputModel, "serialization"], _list_of(refs[Submitted, "serialization"])]},
        ),
    }
    for operation_id, answer_model in _ANSWERS.items():
        bodies[operation_id] = (None, "200", refs[answer_model, "serialization"])
    problem = {
        "description": "Problem details (RFC 9457)",
        "content": _of_type(PROBLEM_JSON, refs[Problem, "serialization"]),
    }
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generate()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in schema["paths"].values():
                for operation in path.values():
                    if operation["operationId"] in bodies:
                        request, status, answer = bodies[operation["operationId"]]
                        if request is not None:
                            operation["requestBody"] = {"required": True, "content": _of_type(JSON, request)}
                        if operation["operationId"] == "async_predict":
                            operation["requestBody"]["content"] |= _of_type(NDJSON, job)
                        operation["responses"][status]["content"] = _of_type(JSON, answer)
                        operation["responses"].pop("422", None)
                        operation["responses"]["default"] = problem
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _of_type(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {media_type: {"schema": schema}}
