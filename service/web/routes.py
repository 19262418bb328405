"""The routes for predictions and jobs."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, PositiveFloat
from pydantic_core import to_json

from batching import Failure, Priority
from batching.task_groups import plain_task_group
from pipelines import AsyncOutputModel
from service.errors import OutputNotJsonError, describe_error
from service.gateway import Gateway
from service.jobs import Job
from service.outputs import output_json
from service.web.answers import JSON, JobView
from service.web.bodies import BodyParser, InvalidItem, read_body
from service.web.problems import ProblemError, error_response

T = TypeVar("T")

LONGEST_WAIT_S = 300.0

ModelName = Annotated[str | None, Query(description="Which model, where there are several; the first if left out.")]
Timeout = Annotated[
    PositiveFloat | None,
    Header(alias="X-Request-Timeout", description="Seconds after which the answer is 504.", allow_inf_nan=False),
]
UnusedTimeout = Annotated[str | None, Header(alias="X-Request-Timeout", include_in_schema=False)]
PriorityHeader = Annotated[
    Priority, Header(alias="X-Priority", description="`interactive` goes before `bulk`, which keeps a share.")
]
JobId = Annotated[str, Path(description="As given by /async/predict.")]
Wait = Annotated[
    float, Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for the job's end before answering.")
]


def make_router(gateway: Gateway) -> APIRouter:
    """The routes, answering by way of `gateway`."""
    router = APIRouter()
    parsers: dict[type[BaseModel], BodyParser] = {}

    def parser(model_name: str | None) -> BodyParser:
        input_model = gateway.input_model(model_name)
        if input_model not in parsers:
            parsers[input_model] = BodyParser(input_model)
        return parsers[input_model]

    @router.post("/sync/predict", operation_id="sync_predict", summary="Run one item and wait for its result")
    async def sync_predict(
        request: Request,
        model_name: ModelName = None,
        timeout: Timeout = None,  # noqa: ASYNC109  # enforced by the scheduler, which names the reason
        priority: PriorityHeader = Priority.INTERACTIVE,
    ) -> Response:
        item = parser(model_name).item(await read_body(request))
        try:
            output = await _while_connected(
                request,
                lambda: gateway.predict(item, model_name=model_name, priority=priority, timeout_s=timeout),
            )
            content = output_json(output)
        except ProblemError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever the pipeline raised is this item's error
            return error_response(error)
        return _json_response(content)

    @router.post(
        "/batch/predict",
        operation_id="batch_predict",
        summary="Run a list of items; each slot has a result or an error",
    )
    async def batch_predict(
        request: Request,
        model_name: ModelName = None,
        timeout: Timeout = None,  # noqa: ASYNC109  # as above
        priority: PriorityHeader = Priority.INTERACTIVE,
    ) -> Response:
        items = parser(model_name).items(await read_body(request))
        valid = [item for item in items if not isinstance(item, InvalidItem)]
        outcomes = iter(
            await _while_connected(
                request,
                lambda: gateway.predict_many(valid, model_name=model_name, priority=priority, timeout_s=timeout),
            )
        )
        slots = [_slot(item) if isinstance(item, InvalidItem) else _slot(next(outcomes)) for item in items]
        return _json_response(b"[" + b",".join(slots) + b"]")

    @router.post(
        "/async/predict", operation_id="async_predict", status_code=HTTPStatus.ACCEPTED, summary="Accept a job"
    )
    async def async_predict(
        request: Request,
        model_name: ModelName = None,
        timeout: UnusedTimeout = None,  # noqa: ASYNC109  # refused, not enforced
        priority: PriorityHeader = Priority.BULK,
    ) -> Response:
        if timeout is not None:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "X-Request-Timeout: a job is not bound to its request; leave the header out, the setting "
                "async_config.timeout bounds how long a job may take",
            )
        job_request = parser(model_name).async_request(await read_body(request))
        job_id = await gateway.submit(job_request, model_name=model_name, priority=priority)
        return _json_response(
            AsyncOutputModel(job_id=job_id).model_dump_json().encode(),
            HTTPStatus.ACCEPTED,
            Location=str(request.url_for("get_job", job_id=job_id).path),
        )

    @router.get("/jobs/{job_id}", operation_id="get_job", summary="What became of a job")
    async def get_job(request: Request, job_id: JobId, wait: Wait = 0.0) -> Response:
        return _job_response(job_id, await _while_connected(request, lambda: gateway.job(job_id, wait_s=wait)))

    @router.delete("/jobs/{job_id}", operation_id="cancel_job", summary="Cancel a job that has not ended")
    async def cancel_job(job_id: JobId) -> Response:
        return _job_response(job_id, await gateway.cancel(job_id))

    return router


async def _while_connected(request: Request, call: Callable[[], Awaitable[T]]) -> T:
    """Await a call; when the client goes away, cancel it, so that what waits in a queue for it leaves the queue."""
    async with plain_task_group() as task_group:

        async def watch() -> None:
            # The body has been read, so the only message left to come says that the client has gone.
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


def _job_response(job_id: str, job: Job | None) -> Response:
    if job is None:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            f"there is no job {job_id!r}: the id is wrong, or the job was removed after its result_ttl",
        )
    return _json_response(JobView.model_validate(job).model_dump_json().encode())


def _json_response(content: bytes, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> Response:
    return Response(content, status, headers, JSON)
