"""Documents what the routes read and write by themselves, bodies and problem details, in the OpenAPI schema."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from modalkit.pipelines import AsyncInputModel, AsyncOutputModel
from modalkit.service.gateway import Gateway
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


def document_bodies(app: FastAPI, gateway: Gateway) -> None:
    """Add the schemas of the gateway's models to those of the routes of `app` that name one by their operation id."""
    names = list(gateway.readiness())
    inputs = _unique(gateway.input_model(name) for name in names)
    outputs = _unique(gateway.output_model(name) for name in names)
    jobs: list[type[BaseModel]] = [AsyncInputModel[model] for model in inputs]  # type: ignore[valid-type]  # classes known at run time
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in (*inputs, *jobs)]
    answers: list[type[BaseModel]] = [*outputs, AsyncOutputModel, *_ANSWERS.values(), Submitted, Problem]
    modes += [(model, "serialization") for model in answers]
    refs, definitions = models_json_schema(modes, ref_template=_REF)

    def any_of(models: Sequence[type[BaseModel]], mode: JsonSchemaMode) -> dict[str, Any]:
        schemas = [refs[model, mode] for model in models]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    item, output = any_of(inputs, "validation"), any_of(outputs, "serialization")
    bodies: dict[str, tuple[dict[str, Any] | None, str, dict[str, Any]]] = {
        "sync_predict": (item, "200", output),
        "batch_predict": (_list_of(item), "200", _list_of(output)),
        "async_predict": (
            _one_or_list(any_of(jobs, "validation")),
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
                            operation["requestBody"]["content"] |= _of_type(NDJSON, any_of(jobs, "validation"))
                        operation["responses"][status]["content"] = _of_type(JSON, answer)
                        operation["responses"].pop("422", None)
                        operation["responses"]["default"] = problem
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema


def _unique(models: Iterable[type[BaseModel]]) -> list[type[BaseModel]]:
    return list(dict.fromkeys(models))


def _one_or_list(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, _list_of(schema)]}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _of_type(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {media_type: {"schema": schema}}
