"""The routes that predict, at once or as jobs."""

from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import to_json

from modalkit.batching import Failure
from modalkit.batching.task_groups import plain_task_group
from modalkit.service.errors import OutputNotJsonError, describe_error
from modalkit.service.gateway import Gateway, find_model
from modalkit.service.outputs import output_json
from modalkit.service.web.answers import json_response
from modalkit.service.web.auth import ApiKey
from modalkit.service.web.bodies import BodyParser, InvalidItem, read_body
from modalkit.service.web.options import PREDICTION_PARAMETERS, SUBMISSION_PARAMETERS, Options
from modalkit.service.web.problems import ProblemError, error_response
from modalkit.service.web.submissions import Submitter

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


def add_prediction_routes(app: FastAPI, gateway: Gateway, api_key: ApiKey | None) -> None:
    """Add the routes over `gateway`.

    They are added to the application itself: a router in between would cost as much time as the route.
    """
    dependencies = [] if api_key is None else [Depends(api_key.dependency)]
    parsers: dict[type[BaseModel], BodyParser] = {}

    def parser(input_model: type[BaseModel]) -> BodyParser:
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
                route_class_override=_PlainRoute,
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
        model = find_model(gateway.models, options.model_name)
        item = parser(model.input_model).item(await read_body(request))
        try:
            output = await while_connected(
                request, lambda: model.predict(item, priority=options.priority, timeout_s=options.timeout_s)
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
        model = find_model(gateway.models, options.model_name)
        items = parser(model.input_model).items(await read_body(request))
        valid = [item for item in items if not isinstance(item, InvalidItem)]
        outcomes = iter(
            await while_connected(
                request, lambda: model.predict_many(valid, priority=options.priority, timeout_s=options.timeout_s)
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
        model = find_model(gateway.models, options.model_name)
        return await Submitter(gateway.jobs, model.name, parser(model.input_model), options).answer(request)


class _PlainRoute(APIRoute):
    """A documented route that calls its endpoint with the request; FastAPI reads no parameters, runs no dependencies.

    What FastAPI does for each request takes as long as all other work for a job.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function that answers a request."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(request)
            return response

        return handle


async def while_connected(request: Request, call: Callable[[], Awaitable[T]]) -> T:
    """Await a call; cancel it when the client disconnects, so that its item leaves the queue."""
    async with plain_task_group() as task_group:

        async def watch() -> None:
            # The body has been read, so the only message that can come is the disconnection.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            task_group.cancel_scope.cancel()

        task_group.start_soon(watch)
        result = await call()
        task_group.cancel_scope.cancel()
        return result
    raise ProblemError(HTTPStatus.REQUEST_TIMEOUT, "the client has gone")


def _slot(outcome: Any) -> bytes:
    if isinstance(outcome, InvalidItem):
        return to_json({"status": "error", "error": outcome.error})
    if isinstance(outcome, Failure):
        return to_json({"status": "error", "error": describe_error(outcome.error)})
    try:
        return output_json(outcome.value)
    except OutputNotJsonError as error:
        return to_json({"status": "error", "error": describe_error(error)})
