"""The routes that predict, at once or as jobs."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic_core import to_json

from modalkit.batching import Failure
from modalkit.service.errors import OutputNotJsonError, describe_error
from modalkit.service.gateway import Gateway
from modalkit.service.outputs import output_json
from modalkit.service.web.answers import json_response
from modalkit.service.web.auth import ApiKey
from modalkit.service.web.bodies import BodyParser, InvalidItem, read_body
from modalkit.service.web.connections import while_connected
from modalkit.service.web.options import PREDICTION_PARAMETERS, SUBMISSION_PARAMETERS, Options
from modalkit.service.web.plain_route import PlainRoute
from modalkit.service.web.problems import ProblemError, error_response
from modalkit.service.web.submissions import Submitter

Endpoint = Callable[[Request], Awaitable[Response]]


def add_prediction_routes(app: FastAPI, gateway: Gateway, api_key: ApiKey | None) -> None:
    """Add the routes, answering by way of `gateway`.

    To the application itself, because a router between the two costs as much time as the route.
    """
    dependencies = [] if api_key is None else [Depends(api_key.dependency)]
    parsers: dict[type[BaseModel], BodyParser] = {}

    def parser(model_name: str | None) -> BodyParser:
        input_model = gateway.input_model(model_name)
        if input_model not in parsers:
            parsers[input_model] = BodyParser(input_model)
        return parsers[input_model]

    def route(path: str, **documentation: Any) -> Callable[[Endpoint], None]:
        def add(endpoint: Endpoint) -> None:
            async def checked(request: Request) -> Response:
                if api_key is not None:
                    await api_key.check(request)
                return await endpoint(request)

            app.router.add_api_route(
                path,
                checked,
                methods=["POST"],
                tags=["predictions"],
                dependencies=dependencies,
                route_class_override=PlainRoute,
                **documentation,
            )

        return add

    @route(
        "/sync/predict",
        operation_id="sync_predict",
        summary="Run one item and wait for its result",
        openapi_extra=PREDICTION_PARAMETERS,
    )
    async def sync_predict(request: Request) -> Response:
        options = Options.of_prediction(request)
        item = parser(options.model_name).item(await read_body(request))
        try:
            output = await while_connected(
                request,
                lambda: gateway.predict(
                    item, model_name=options.model_name, priority=options.priority, timeout_s=options.timeout_s
                ),
            )
            content = output_json(output)
        except ProblemError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever the pipeline raised is this item's error
            return error_response(error)
        return json_response(content)

    @route(
        "/batch/predict",
        operation_id="batch_predict",
        summary="Run a list of items; each slot has a result or an error",
        openapi_extra=PREDICTION_PARAMETERS,
    )
    async def batch_predict(request: Request) -> Response:
        options = Options.of_prediction(request)
        items = parser(options.model_name).items(await read_body(request))
        valid = [item for item in items if not isinstance(item, InvalidItem)]
        outcomes = iter(
            await while_connected(
                request,
                lambda: gateway.predict_many(
                    valid, model_name=options.model_name, priority=options.priority, timeout_s=options.timeout_s
                ),
            )
        )
        slots = [_slot(item) if isinstance(item, InvalidItem) else _slot(next(outcomes)) for item in items]
        return json_response(b"[" + b",".join(slots) + b"]")

    @route(
        "/async/predict",
        operation_id="async_predict",
        status_code=HTTPStatus.ACCEPTED,
        summary="Accept a job, a list of jobs, or a stream of them",
        description="A job is accepted once it is stored. A stream (NDJSON) is answered with a line for each of its "
        "lines, with the status 200.",
        openapi_extra=SUBMISSION_PARAMETERS,
    )
    async def async_predict(request: Request) -> Response:
        options = Options.of_submission(request)
        return await Submitter(gateway, parser(options.model_name), options).answer(request)


def _slot(outcome: Any) -> bytes:
    if isinstance(outcome, InvalidItem):
        return to_json({"status": "error", "error": outcome.error})
    if isinstance(outcome, Failure):
        return to_json({"status": "error", "error": describe_error(outcome.error)})
    try:
        return output_json(outcome.value)
    except OutputNotJsonError as error:
        return to_json({"status": "error", "error": describe_error(error)})
