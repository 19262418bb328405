"""The routes that predict, at once or as jobs."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, partial, wraps
from http import HTTPStatus
from typing import Annotated, Any, TypeVar, Union

from fastapi import Body, Depends, FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from modalkit.pipelines import AsyncInputModel, AsyncOutputModel
from modalkit.service.gateway import Gateway, find_model
from modalkit.service.outputs import output_json
from modalkit.service.settings import KeyScope
from modalkit.service.validation import run_valid
from modalkit.service.web.admission import Admission, Reception, read_body
from modalkit.service.web.answers import JOB_LINKS, JSON, PROBLEM_ANSWERS, FailedItem, Submitted
from modalkit.service.web.auth import ApiKeys, caller_of, end_request
from modalkit.service.web.bodies import BodyParser, check_encoding
from modalkit.service.web.direct import DirectRequest
from modalkit.service.web.events import EventStream, prediction_events
from modalkit.service.web.lines import LineStream
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
    ProblemError,
    error_json,
    error_response,
    outcome_json,
    unexpected_error_response,
)
from modalkit.service.web.submissions import Submitter

Endpoint = Callable[[Request], Awaitable[Response]]
Responses = dict[int | str, dict[str, Any]]
T = TypeVar("T")

WATCH_AFTER_S = 0.1
"""Seconds after which a request that waits is watched: a task for each request would cost a fifth of its time."""


class PostRoutes:
    """POST routes of an application: FastAPI documents them, and `DirectRoutes` answers them."""

    def __init__(self, app: FastAPI, keys: ApiKeys, admission: Admission) -> None:
        self._app = app
        self._keys = keys
        self._admission = admission
        self._endpoints: dict[str, Endpoint] = {}
        app.add_middleware(DirectRoutes, endpoints=self._endpoints)

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
        """A decorator that makes a function the endpoint of requests to `path`, for keys with `key_scope`.

        `taken`, `options` and `answer` are the types of what it takes and answers, `responses` its other answers: for
        the documentation only, as `more` is.
        """

        def documented_body(body: Annotated[taken, Body()]) -> None: ...

        def add(endpoint: Endpoint) -> None:
            @wraps(endpoint)
            async def checked(request: Request) -> Response:
                await self._keys.check(request, key_scope)
                check_encoding(request)
                reception = Reception(self._admission, request)
                try:
                    return await endpoint(request)
                finally:
                    reception.release()

            self._endpoints[path] = checked
            self._app.router.add_api_route(
                path,
                checked,
                methods=["POST"],
                tags=["predictions"],
                response_model=answer,
                responses=PROBLEM_ANSWERS | (responses or {}),
                dependencies=[Depends(documented_body), Depends(options), *self._keys.documented()],
                **more,
            )

        return add


def add_prediction_routes(routes: PostRoutes, gateway: Gateway, admission: Admission) -> None:
    """Add the routes over `gateway` that predict, at once or as jobs."""
    route, models = routes.add, gateway.models.values()
    item: Any = Union[tuple(model.input_model for model in models)]  # noqa: UP007  # types known at run time
    job: Any = Union[tuple(AsyncInputModel[model.input_model] for model in models)]  # type: ignore[name-defined]  # noqa: UP007  # as above
    output: Any = Union[tuple(model.output_model for model in models)]  # noqa: UP007  # as above
    parser = cache(partial(BodyParser, admission=admission))

    def submitter(request: Request) -> Submitter:
        options = SubmissionOptions.of(request)
        model = find_model(gateway.models, options.model_name)
        return Submitter(gateway.jobs, model.name, parser(model.input_model), options, caller_of(request), admission)

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
        options = PredictionOptions.of(request)
        model = find_model(gateway.models, options.model_name)
        await admission.check(partial(model.check_room, priority=options.priority, timeout_s=options.timeout_s))
        item, caller = parser(model.input_model).item(await read_body(request)), caller_of(request)
        caller.take_items(1)
        if takes_events(request):
            return EventStream(prediction_events(model, item, options.for_owner(caller.owner)))
        call = model.predict(item, **options.for_owner(caller.owner))
        try:
            return Response(output_json(await while_connected(request, call)), media_type=JSON)
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
        options = StreamOptions.of(request)
        model = find_model(gateway.models, options.model_name)
        caller = caller_of(request)
        if takes_lines(request):
            await model.predict_many([])  # a model that takes nothing now fails the request, not each line
            return LineStream(PredictionStream(model, parser(model.input_model), options, caller).answer)
        await admission.check(partial(model.check_room, priority=options.priority, timeout_s=options.timeout_s))
        items = await parser(model.input_model).items(await read_body(request))
        caller.take_items(len(items))
        run = partial(model.predict_many, **options.for_owner(caller.owner))
        outcomes = await run_valid(items, lambda valid: while_connected(request, run(valid)))
        return Response(
            b"[" + b",".join(await admission.map(partial(outcome_json, error_json=error_json), outcomes)) + b"]",
            media_type=JSON,
        )

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


class DirectRoutes:
    """ASGI middleware that answers POST requests by `endpoints`, an endpoint for each path, and passes on all others.

    FastAPI only documents these routes: its routing, parameters and middleware take longer than all other work for a
    request. An error that is none of `KNOWN_ERRORS` is answered with 500 and raised, so that the server logs it.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application does."""
        root_path = scope.setdefault("root_path", "")  # servers may leave it out, and `fastapi_offline` needs it
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            # As Starlette does: a root path counts only where a slash follows.
            endpoint = self._endpoints.get(path.removeprefix(root_path) if path.startswith(f"{root_path}/") else path)
        try:
            if endpoint is None:
                await self._app(scope, receive, send)
                return
            try:
                response = await endpoint(DirectRequest(scope, receive, send))
            except KNOWN_ERRORS as error:
                response = error_response(error)
            except Exception as error:
                await unexpected_error_response(error)(scope, receive, send)
                raise
            await response(scope, receive, send)
        finally:
            end_request(scope)


async def while_connected(request: Request, call: Awaitable[T]) -> T:
    """Await a call; cancel it when the client disconnects, so that its item leaves the queue.

    Only a request that has waited for `WATCH_AFTER_S` seconds gets a task that watches its connection.
    """
    watch: asyncio.Task[None] | None = None
    task, has_gone = asyncio.current_task(), False

    async def cancel_when_disconnected() -> None:
        nonlocal has_gone
        # The body has been read, so the only message that can come is the disconnection.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if task is not None:
            has_gone = True
            task.cancel()

    def start_watch() -> None:
        nonlocal watch
        watch = asyncio.create_task(cancel_when_disconnected())

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, start_watch)
    try:
        return await call
    except asyncio.CancelledError:
        # A cancel scope would do the same, at several times the cost for each request that nothing disturbs.
        if not has_gone or task is None or task.uncancel():
            raise
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()
    raise ProblemError(HTTPStatus.REQUEST_TIMEOUT, "the client has gone")
