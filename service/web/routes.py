"""The routes that predict, at once or as jobs, and the short way past FastAPI for what comes by the thousand."""

import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, partial
from http import HTTPStatus
from typing import Annotated, Any, Union

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from modalkit.batching import RequestOptions
from modalkit.pipelines import AsyncInputModel, AsyncOutputModel
from modalkit.service.gateway import Gateway, Model, find_model
from modalkit.service.outputs import output_json
from modalkit.service.settings import KeyScope
from modalkit.service.validation import documented_model, run_valid
from modalkit.service.web.admission import Admission, Reception, read_body
from modalkit.service.web.answers import JOB_LINKS, PROBLEM_ANSWERS, FailedItem, Submitted
from modalkit.service.web.auth import ApiKeys, Caller, caller_of, end_request
from modalkit.service.web.bodies import BodyParser, check_encoding
from modalkit.service.web.direct import DirectRequest, DirectResponse, list_response, while_connected
from modalkit.service.web.events import EventStream, prediction_events
from modalkit.service.web.job_routes import JOB_PATH
from modalkit.service.web.line_models import Target
from modalkit.service.web.lines import LineStream
from modalkit.service.web.observing import path_of
from modalkit.service.web.options import (
    PredictionOptions,
    StreamOptions,
    SubmissionOptions,
    SyncOptions,
    prefers_async,
    takes_events,
    takes_lines,
)
from modalkit.service.web.prediction_stream import PredictionStream
from modalkit.service.web.problems import (
    KNOWN_ERRORS,
    error_json,
    error_response,
    outcomes_json,
)
from modalkit.service.web.submissions import Submitter

Endpoint = Callable[[Request], Awaitable[Response]]
DirectRoute = tuple[Endpoint, KeyScope, BaseRoute | None]
"""An endpoint, the scope that a key needs for it, and its route where the path has parameters: metrics name that."""
Responses = dict[int | str, dict[str, Any]]

_STORED_JOB = re.compile("/jobs/[0-9a-f-]{36}")
"""The path of a job whose id is a UUID."""


class RouteTable:
    """Routes of an application that FastAPI documents, and `DirectRoutes` answers."""

    def __init__(self, app: FastAPI, keys: ApiKeys, admission: Admission) -> None:
        self._app = app
        self._keys = keys
        self._endpoints: dict[tuple[str, str], DirectRoute] = {}
        app.add_middleware(DirectRoutes, endpoints=self._endpoints, keys=keys, admission=admission)

    def add_jobs(self, router: APIRouter) -> None:
        """Include the routes of jobs. A request that only asks for one job is answered by `DirectRoutes`."""
        self._app.include_router(router, dependencies=self._keys.requires(KeyScope.JOBS))
        (route,) = (route for route in router.routes if isinstance(route, APIRoute) and route.name == "get_job")

        def get_job(request: Request) -> Awaitable[Response]:
            answer: Awaitable[Response] = route.endpoint(request, request.scope["path"].rpartition("/")[2])
            return answer

        self._endpoints["GET", JOB_PATH] = get_job, KeyScope.JOBS, route

    def add(
        self,
        path: str,
        key_scope: KeyScope,
        taken: Any,
        options: type,
        answer: Any,
        responses: Responses | None = None,
        **more: Any,
    ) -> Callable[[Endpoint], None]:
        """A decorator that makes a function the endpoint of POST requests to `path`, for keys with `key_scope`.

        `taken`, `options` and `answer` are the types of what it takes and answers, `responses` its other answers: for
        the documentation only, as `more` is.
        """

        def documented_body(body: Annotated[taken, Body()]) -> None: ...

        def add(endpoint: Endpoint) -> None:
            self._endpoints["POST", path] = endpoint, key_scope, None
            self._app.router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                tags=["predictions"],
                response_model=answer,
                responses=PROBLEM_ANSWERS | (responses or {}),
                dependencies=[Depends(documented_body), Depends(options), *self._keys.documented()],
                **more,
            )

        return add


def add_prediction_routes(routes: RouteTable, gateway: Gateway, admission: Admission) -> None:
    """Add the routes over `gateway` that predict, at once or as jobs."""
    route, models = routes.add, gateway.models.values()
    items = {model.name: documented_model(model.input_model) for model in models}
    item: Any = _labelled(items)
    job: Any = _labelled({name: AsyncInputModel[kind] for name, kind in items.items()})  # type: ignore[valid-type]  # a class known at run time
    output: Any = _labelled({model.name: documented_model(model.output_model) for model in models})
    parser = cache(partial(BodyParser, admission=admission))

    @cache
    def target_of(model_name: str, input_model: type[BaseModel]) -> Target:
        return Target(gateway.models[model_name], parser(input_model))

    def find(model_name: str | None) -> Target:
        model = find_model(gateway.models, model_name)
        return target_of(model.name, model.input_model)

    def check_room(model: Model, caller: Caller, options: RequestOptions) -> Awaitable[None]:
        """Raise what a request should be refused with before its body is read."""
        caller.take_items(0)
        return admission.check(model.check_room, **options)

    def submitter(request: Request) -> Submitter:
        options = SubmissionOptions.of(request)
        return Submitter(gateway.jobs, find, options, caller_of(request), admission)

    @route(
        "/sync/predict",
        KeyScope.PREDICT,
        item,
        SyncOptions,
        output,
        {202: {"model": AsyncOutputModel, "description": "Accepted as a job", "links": JOB_LINKS}},
        summary="Run one item and wait for its result",
        description="With `Prefer: respond-async` the item becomes a job, as by `/async/predict`. With `Accept: "
        "text/event-stream`, the pieces of a pipeline with `predict_stream` are events `piece`, and the result is the "
        "last event, `result`. An error after the first event is an event `error` with problem details.",
    )
    async def sync_predict(request: Request) -> Response:
        if prefers_async(request):
            caller_of(request).require(KeyScope.JOBS)
            return await submitter(request).answer_later(request)
        asked, caller = PredictionOptions.of(request), caller_of(request)
        model, options = find_model(gateway.models, asked.model_name), asked.for_owner(caller.owner)
        await check_room(model, caller, options)
        item = parser(model.input_model).item(await read_body(request))
        caller.take_items(1)
        if takes_events(request):
            return EventStream(prediction_events(model, item, options))
        try:
            return DirectResponse(output_json(await while_connected(request, model.predict(item, **options))))
        except Exception as error:  # noqa: BLE001  # whatever the pipeline raised is this item's error
            return error_response(error)

    @route(
        "/batch/predict",
        KeyScope.PREDICT,
        list[item],
        StreamOptions,
        list[output | FailedItem],
        summary="Run a list of items, or a stream of them; each has a result or an error",
        description="A stream (NDJSON) is answered with a line for each of its lines as soon as it is done, with its "
        "`index` from 0; `ordered=true` keeps the order. Its items are `bulk` unless `X-Priority` says otherwise. An "
        "error's line has the `problem` that a single request would be answered with.",
    )
    async def batch_predict(request: Request) -> Response:
        asked, caller = StreamOptions.of(request), caller_of(request)
        model, options = find_model(gateway.models, asked.model_name), asked.for_owner(caller.owner)
        if takes_lines(request):
            await model.predict_many([])  # a model that takes nothing now fails the request, not each line
            return LineStream(PredictionStream(find, asked, caller).answer, admission)
        await check_room(model, caller, options)
        items = await parser(model.input_model).items(await read_body(request))
        caller.take_items(len(items))
        run = partial(model.predict_many, **options)
        outcomes = await run_valid(items, lambda valid: while_connected(request, run(valid)))
        slots = await admission.map(partial(outcomes_json, error_json=error_json), outcomes)
        return list_response(slots)

    @route(
        "/async/predict",
        KeyScope.JOBS,
        job | list[job],
        SubmissionOptions,
        AsyncOutputModel | list[Submitted],
        {202: {"links": JOB_LINKS}},
        status_code=HTTPStatus.ACCEPTED,
        summary="Accept a job, a list of jobs, or a stream of them",
        description="A job is accepted once it is stored. A stream (NDJSON) is answered with a line for each of its "
        "lines, with the status 200.",
    )
    async def async_predict(request: Request) -> Response:
        return await submitter(request).answer(request)


def _labelled(kinds: Mapping[str, type[BaseModel]]) -> Any:
    """The union of these types, each with the name of its model in the documentation where they differ."""
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return Union[  # noqa: UP007  # types known at run time
        tuple(
            Annotated[kind, Field(title=name, description=f"With `?model_name={name}`.")]
            for name, kind in kinds.items()
        )
    ]


class DirectRoutes:
    """ASGI middleware that answers requests by `endpoints`, and passes on all others, each with its `Reception`.

    There is an endpoint for each method and path, with the scope that a key needs for it. That of ``/jobs/{job_id}``
    answers requests without a query for jobs whose id is a UUID. FastAPI only documents these routes: its routing,
    parameters and middleware take longer than all other work for a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        endpoints: Mapping[tuple[str, str], DirectRoute],
        keys: ApiKeys,
        admission: Admission,
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._keys = keys
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does."""
        scope.setdefault("root_path", "")  # servers may leave it out, and `fastapi_offline` needs it
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, found = path_of(scope), None
        if scope["method"] == "POST":
            found = self._endpoints.get(("POST", path))
        elif scope["method"] == "GET" and not scope["query_string"] and _STORED_JOB.fullmatch(path):
            found = self._endpoints.get(("GET", JOB_PATH))
        try:
            with Reception(self._admission, scope):
                if found is None:
                    await self._app(scope, receive, send)
                    return
                endpoint, key_scope, route = found
                if route is not None:
                    scope["route"] = route
                request = DirectRequest(scope, receive, send)
                try:
                    if self._keys.are_asked_for:
                        await self._keys.check(request, key_scope)
                    if scope["method"] == "POST":
                        check_encoding(request)
                    response = await endpoint(request)
                except KNOWN_ERRORS as error:
                    response = error_response(error)
            await response(scope, receive, send)
        finally:
            end_request(scope)
