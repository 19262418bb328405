"""The HTTP application: its routes, its API keys, and its gateway, which is open as long as the server runs."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modalkit.service.errors import Readiness, describe_error
from modalkit.service.gateway import Gateway, Model
from modalkit.service.settings import ADAPTERS, Adapter, AppSettings, AuthConfig, KeyScope, RequestConfig
from modalkit.service.validation import documented_model
from modalkit.service.version import VERSION
from modalkit.service.web.adapters.openai import make_batches_router, make_models_router
from modalkit.service.web.adapters.tei import add_tei_routes
from modalkit.service.web.adapters.vllm import add_vllm_routes
from modalkit.service.web.admin_routes import make_admin_router
from modalkit.service.web.admission import Admission
from modalkit.service.web.answers import EVENT_STREAM, JSON, NDJSON, BatchLine, FailedSlot, Problem, SubmittedLine
from modalkit.service.web.auth import configured_keys
from modalkit.service.web.batch_routes import make_batch_router
from modalkit.service.web.direct import put_outside
from modalkit.service.web.job_routes import make_job_router
from modalkit.service.web.metrics import CONTENT_TYPE, exposition
from modalkit.service.web.observing import RequestObserver
from modalkit.service.web.problems import ProblemError, error_response, install_problem_handlers
from modalkit.service.web.routes import DirectRoutes, RouteTable, add_prediction_routes
from modalkit.service.web.ui import add_page

logger = logging.getLogger(__name__)

NOT_STARTED = (
    "this application was not started, so its models were never loaded. If another application mounts it, write "
    "`app = FastAPI(lifespan=lifespan_of(models))` for that one, where `models` is what create_app returned, and "
    "`from modalkit import lifespan_of`. A test client must be entered as a context manager. If you open the gateway "
    "yourself, write `create_app(gateway, owns_gateway=False)`."
)
"""The answer to requests of an application whose lifespan was not run."""

DESCRIPTION = """
Single requests, run in batches. `POST /sync/predict` waits for one result; `POST /batch/predict` takes a list;
`POST /async/predict` takes one job, a list of them or a stream (NDJSON), and answers with a `job_id` for each as soon
as it is stored. The result is kept for `GET /jobs/{job_id}` and sent to the queue that the request names. Errors are
problem details (RFC 9457).
"""


def create_app(
    gateway: Gateway,
    *,
    auth: AuthConfig | None = None,
    limits: RequestConfig | None = None,
    owns_gateway: bool = True,
    require_all_models: bool = False,
    adapters: Collection[Adapter] = ADAPTERS,
    ui: bool = True,
) -> FastAPI:
    """The HTTP service over a gateway, which is opened and closed with it (by ASGI's lifespan) if it `owns_gateway`.

    A model that could not be loaded leaves the service ready for the others, unless it must `require_all_models`.
    `adapters` are the other servers whose clients it answers, by routes in their shapes. With `ui`, a page at ``/`` and
    ``/ui`` shows what the service does; what it shows needs a key.

    An application that another one mounts has to be started by that one: see `lifespan_of`. Until then, each request is
    answered with 503 and an explanation.

    `auth` says which API keys a request needs; without it none is needed, whatever the settings of the gateway are:
    pass ``auth=settings.app_settings.auth_config`` to use the configured keys, as ``modalkit serve`` does. Health
    checks and documentation need no key; nor do metrics, unless `auth` says so. `limits` are those of requests. Raises
    `LoadError` for an API key that cannot be used; so does the start of the lifespan for one that cannot be read from
    AWS SSM.
    """
    auth = auth or AuthConfig()
    keys = configured_keys(auth)
    start = _Start(is_needed=owns_gateway or auth.uses_ssm)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # The keys first, so that an error in a name shows before models are loaded.
        async with keys.opened(), gateway if owns_gateway else nullcontext():
            start.is_needed = False
            yield

    app = FastAPIOffline(
        title="modalkit",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a client that lost the id in /jobs/<id> must not reach /jobs
        generate_unique_id_function=lambda route: route.name,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `RequestObserver` does all of it
    )
    admission = Admission(limits)
    routes = RouteTable(app, keys, admission)
    add_prediction_routes(routes, gateway, admission)
    if "tei" in adapters:
        add_tei_routes(routes, gateway.models, admission)
    if "vllm" in adapters:
        add_vllm_routes(routes, gateway.models, admission)
    if "openai" in adapters:
        app.include_router(make_models_router(gateway.models), dependencies=keys.requires(KeyScope.PREDICT))
        app.include_router(make_batches_router(gateway, admission), dependencies=keys.requires(KeyScope.JOBS))
    app.add_middleware(_Entrance, start=start)  # around the routes: none answers before the start
    app.add_middleware(RequestObserver, routes=app.routes)  # the outermost one: it measures everything
    put_outside(app, (DirectRoutes, _Entrance, RequestObserver))
    routes.add_jobs(make_job_router(gateway.jobs, admission))
    app.include_router(make_batch_router(gateway.jobs), dependencies=keys.requires(KeyScope.JOBS))
    _add_metrics(app, gateway, admission, [] if auth.open_metrics else keys.requires(KeyScope.METRICS))
    app.include_router(make_admin_router(gateway, keys.requires(KeyScope.ADMIN)))
    _add_health(app, gateway, require_all_models=require_all_models)
    install_problem_handlers(app)
    _complete_schema(app, gateway.models)

    if ui:
        add_page(app, gateway, keys)
    else:

        @app.get("/", include_in_schema=False)
        async def root() -> RedirectResponse:
            return RedirectResponse("docs")

    return app


def configured_app(gateway: Gateway, settings: AppSettings, *, owns_gateway: bool = True) -> FastAPI:
    """The HTTP service over a gateway as the settings have it; see `create_app`."""
    return create_app(
        gateway,
        auth=settings.auth_config,
        limits=settings.request_config,
        owns_gateway=owns_gateway,
        require_all_models=settings.require_all_models,
        adapters=settings.adapters,
        ui=settings.ui,
    )


def lifespan_of(*apps: Starlette) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A lifespan for the application that mounts `apps`: it starts them, and ends them in the opposite order.

    Frameworks run the lifespan of the outermost application only. So give this one to it, as in
    ``FastAPI(lifespan=lifespan_of(models))``, or enter it in the lifespan of your own:
    ``async with lifespan_of(models)(app): ...``.
    """

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for app in apps:
                await stack.enter_async_context(app.router.lifespan_context(app))
            yield

    return lifespan


@dataclass(slots=True)
class _Start:
    """Whether the lifespan must run before requests can be answered."""

    is_needed: bool
    is_logged: bool = False


class _Entrance:
    """Refuses requests until the application was started, and passes HEAD on as GET."""

    def __init__(self, app: ASGIApp, start: _Start) -> None:
        self._app = app
        self._start = start

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if not self._start.is_needed or scope["type"] != "http":
            is_head = scope["type"] == "http" and scope["method"] == "HEAD"
            return (self._answer_head if is_head else self._app)(scope, receive, send)
        if not self._start.is_logged:
            self._start.is_logged = True
            logger.error("Requests are refused: %s", NOT_STARTED)
        problem = ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, NOT_STARTED, headers={"Retry-After": "1"})
        return error_response(problem)(scope, receive, send)

    async def _answer_head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer without the body, which may have no end: `receive` says that the client left once the head is sent."""

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        as_get = {**scope, "method": "GET"}  # a copy: the server needs the original method
        try:
            await self._app(as_get, receive, send_head)
        finally:
            scope["route"] = as_get.get("route")  # for the metrics


def _complete_schema(app: FastAPI, by_name: Mapping[str, Model]) -> None:
    """Add to the OpenAPI schema what FastAPI cannot declare: problem details, names of models, lines and events.

    `x-models` says which model takes and gives what.
    """
    models = (Problem, FailedSlot, SubmittedLine, BatchLine)
    refs, added = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        schema["components"]["schemas"] |= added["$defs"]
        for operations in schema["paths"].values():
            for operation in operations.values():
                tags = operation.get("tags", ())  # a user's own route may have none
                for parameter in operation.get("parameters", ()):
                    _complete_parameter(parameter)
                    if any((tag, parameter["name"]) in _NAMES_OF_MODELS for tag in tags):
                        parameter["schema"]["enum"] = list(by_name)
        sync, batch, submit = (schema["paths"][f"/{path}/predict"]["post"] for path in ("sync", "batch", "async"))
        for streams in (sync, *(schema["paths"][path]["get"] for path in ("/jobs/events", "/jobs/{job_id}/events"))):
            streams["responses"]["200"]["content"][EVENT_STREAM] = {"schema": _EVENT}
        for operation in (batch, submit):
            content = operation["requestBody"]["content"]
            content[NDJSON] = {"schema": content[JSON]["schema"].get("anyOf", [content[JSON]["schema"]])[-1]["items"]}
        answers = batch["responses"]["200"]["content"]
        index = {"type": "object", "properties": {"index": {"type": "integer"}}, "required": ["index"]}
        outcome = {"anyOf": [answers[JSON]["schema"]["items"], refs[FailedSlot, "serialization"]]}
        answers[NDJSON] = {"schema": {"allOf": [index, outcome]}}
        line = refs[SubmittedLine, "serialization"]
        submit["responses"]["200"] = {"description": "To a stream", "content": {NDJSON: {"schema": line}}}
        schema["x-models"] = {
            name: {
                "input": documented_model(model.input_model).model_json_schema(),
                "output": documented_model(model.output_model).model_json_schema(),
            }
            for name, model in by_name.items()
        }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the schema

    @lru_cache(maxsize=8)
    def rendered(root_path: str) -> bytes:
        return to_json({**app.openapi(), **({"servers": [{"url": root_path}]} if root_path else {})})

    async def answer(request: Request) -> Response:
        return Response(rendered(request.scope["root_path"].rstrip("/")), media_type=JSON)

    # FastAPI's own route makes and writes the schema for each request, which delays others by several milliseconds.
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", None) != app.openapi_url]
    app.add_route(str(app.openapi_url), answer, include_in_schema=False)


_NAMES_OF_MODELS = {("predictions", "model_name"), ("administration", "name")}
"""The tag and the name of each parameter that must name a model. A filter of jobs may name one that was removed."""
_EVENT = {
    "type": "object",
    "description": "An event: its name, its data, which is JSON, and its id where a stream can go on after it.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}, "id": {"type": "string"}},
}


def _complete_parameter(parameter: dict[str, Any]) -> None:
    """Remove null from the schema of an optional header or query parameter: it can be left out, but not be null."""
    match parameter["schema"].pop("anyOf", None):
        case None:
            pass
        case [kind, {"type": "null"}]:
            parameter["schema"] |= kind
        case kinds:
            parameter["schema"]["anyOf"] = kinds


def _add_metrics(app: FastAPI, gateway: Gateway, admission: Admission, dependencies: Sequence[Any]) -> None:
    @app.get(
        "/metrics",
        tags=["health"],
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        dependencies=dependencies,
    )
    async def metrics() -> Response:
        return Response(await exposition(gateway, admission), media_type=CONTENT_TYPE)


def _add_health(app: FastAPI, gateway: Gateway, *, require_all_models: bool) -> None:
    get = partial(app.get, tags=["health"])

    @get(
        "/health/live",
        summary="Whether the process can go on",
        responses={503: {"description": "A model is broken: replace the process"}},
    )
    async def live() -> JSONResponse:
        broken = [name for name, model in gateway.models.items() if model.readiness is Readiness.BROKEN]
        if broken:
            return JSONResponse({"status": "broken", "models": broken}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "live"})

    summary = "every model takes" if require_all_models else "the models that could be loaded take"

    @get("/health", include_in_schema=False)  # for clients and probes of other servers
    @get("/health/ready", summary=f"Whether {summary} requests", responses={503: {"description": "Not yet"}})
    async def ready() -> JSONResponse:
        models = {name: model.readiness for name, model in gateway.models.items()}
        states = set(models.values())
        excused = set() if require_all_models else {Readiness.FAILED}
        failure = gateway.jobs.failure
        is_ready = states - excused == {Readiness.READY} and failure is None
        answer: dict[str, Any] = {"status": "ready" if is_ready else "not ready", "models": models}
        problems = {name: model.problem for name, model in gateway.models.items()}
        problems["jobs"] = None if failure is None else describe_error(failure)
        if not is_ready and (reasons := {name: problem for name, problem in problems.items() if problem}):
            answer["reasons"] = reasons
        return JSONResponse(
            answer,
            HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE,
        )
