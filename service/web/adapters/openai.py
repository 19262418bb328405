"""OpenAI's routes: ``/v1/models``, ``/v1/files`` and ``/v1/batches``."""

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cache, partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect

from modalkit.service.gateway import Gateway, Model, find_model
from modalkit.service.web.adapters.openai_kept import FILE, KeptBatches
from modalkit.service.web.adapters.openai_shapes import (
    BatchList,
    BatchObject,
    FileDeleted,
    FileList,
    FileObject,
    ListedModel,
    ModelList,
    NewBatch,
)
from modalkit.service.web.adapters.openai_submission import BATCH, Submissions
from modalkit.service.web.admission import Admission, declared_bytes, reception_of
from modalkit.service.web.answers import JSON, PROBLEM_ANSWERS
from modalkit.service.web.auth import caller_of
from modalkit.service.web.bodies import BodyParser, check_encoding, read_as
from modalkit.service.web.job_routes import CANNOT_LIST, administration_of, refuse_unknown_query
from modalkit.service.web.problems import KNOWN_ERRORS, ProblemError, as_problem, error_response, invalid

_UPLOAD_SCHEMA = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    "required": ["file", "purpose"],
}
UPLOAD = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD_SCHEMA}}}
MAX_FIELDS, MAX_FIELD_BYTES = 100, 65_536
"""Limits of the fields of an upload beside the file, which are held in memory."""

Purpose = Annotated[Literal["batch", "batch_output"], Query(description="Files of results are not listed.")]
FileLimit = Annotated[int, Query(ge=1, le=10_000, description="How many at most.")]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]
After = Annotated[str | None, Query(description="The id of the last one that was seen.")]


class _Route(APIRoute):
    """Repeats the detail of a problem as `message`, which is all that OpenAI's client shows of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                problem = invalid(error.errors())
            except KNOWN_ERRORS as error:
                problem = as_problem(error)
            return error_response(problem, message=problem.detail)

        return answer


def make_models_router(models: Mapping[str, Model]) -> APIRouter:
    """The routes that show `models`."""
    router = APIRouter(tags=["OpenAI"], route_class=_Route, responses=PROBLEM_ANSWERS)
    created = int(time.time())

    @router.get("/v1/models", summary="List the models")
    async def openai_list_models() -> ModelList:
        return ModelList(data=[ListedModel(id=name, created=created) for name in models])

    @router.get("/v1/models/{model:path}", summary="One model")
    async def openai_get_model(model: str) -> ListedModel:
        return ListedModel(id=find_model(models, model).name, created=created)

    return router


def make_batches_router(gateway: Gateway, admission: Admission) -> APIRouter:
    """The routes over the jobs of `gateway`."""
    limits = admission.limits
    submissions = Submissions(gateway, admission, cache(partial(BodyParser, admission=admission)))
    router = APIRouter(
        tags=["OpenAI"],
        route_class=_Route,
        dependencies=[Depends(refuse_unknown_query)],
        responses=PROBLEM_ANSWERS,
        lifespan=submissions.resumed,
    )

    def kept(request: Request) -> KeptBatches:
        administration = administration_of(gateway.jobs, CANNOT_LIST)
        return KeptBatches(administration, gateway, caller_of(request), limits, submissions)

    uploading_bytes = 0

    @router.post(
        "/v1/files",
        summary="Upload the input of a batch",
        openapi_extra={"requestBody": UPLOAD},
    )
    async def openai_upload_file(request: Request) -> FileObject:
        if (size := declared_bytes(request)) is None:
            raise ProblemError(HTTPStatus.LENGTH_REQUIRED, "Content-Length: is missing; send it")
        if size > limits.max_file_bytes:
            detail = f"the file is larger than {limits.max_file_bytes} bytes (request_config.max_file_bytes)"
            raise ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{detail}: send several smaller ones")
        check_encoding(request)
        reception, in_memory_bytes = reception_of(request.scope), min(size, MultiPartParser.spool_max_size)
        reception.check_room(in_memory_bytes)
        reception.hold(in_memory_bytes)
        nonlocal uploading_bytes
        own = kept(request)
        uploading_bytes += size
        try:
            # In this order: an upload that ends meanwhile counts twice, and not never.
            await own.check_room(uploading_bytes)
            async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile) or purpose != "batch":
                    detail = "send a form (multipart/form-data) with a `file`, and `purpose`, which must be `batch`"
                    raise ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
                return await own.add_file(file)
        except ClientDisconnect:
            raise admission.count_cut_body(request.scope["path"]) from None
        finally:
            uploading_bytes -= size

    @router.get("/v1/files", summary="List uploaded files")
    async def openai_list_files(
        request: Request, purpose: Purpose = "batch", limit: FileLimit = 10_000, after: After = None
    ) -> FileList:
        own = kept(request)
        ids = await own.documents.document_ids(FILE, own.visible_owner) if purpose == "batch" else []
        chosen, has_more = _page(ids, limit, after)
        return FileList(data=[await own.file(file_id) for file_id in chosen], has_more=has_more)

    @router.get("/v1/files/{file_id}", summary="One file")
    async def openai_get_file(request: Request, file_id: str) -> FileObject:
        return await kept(request).file(file_id)

    @router.delete("/v1/files/{file_id}", summary="Remove a file")
    async def openai_delete_file(request: Request, file_id: str) -> FileDeleted:
        await kept(request).remove_file(file_id)
        return FileDeleted(id=file_id)

    @router.get("/v1/files/{file_id}/content", summary="The content of a file", response_class=StreamingResponse)
    async def openai_file_content(request: Request, file_id: str) -> StreamingResponse:
        own = kept(request)
        await own.check_file(file_id)
        return StreamingResponse(own.content(file_id), media_type="application/jsonl")

    @router.post(
        "/v1/batches",
        summary="Run the requests of a file as a batch",
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": NewBatch.model_json_schema()}}}},
    )
    async def openai_create_batch(request: Request) -> BatchObject:
        return await kept(request).create(await read_as(NewBatch, request))

    @router.get("/v1/batches", summary="List batches")
    async def openai_list_batches(request: Request, limit: Limit = 20, after: After = None) -> BatchList:
        own = kept(request)
        chosen, has_more = _page(await own.documents.document_ids(BATCH, own.visible_owner), limit, after)
        return BatchList(data=[await own.batch(batch_id) for batch_id in chosen], has_more=has_more)

    @router.get("/v1/batches/{batch_id}", summary="One batch")
    async def openai_get_batch(request: Request, batch_id: str) -> BatchObject:
        return await kept(request).batch(batch_id)

    @router.post("/v1/batches/{batch_id}/cancel", summary="Cancel the requests of a batch that have not ended")
    async def openai_cancel_batch(request: Request, batch_id: str) -> BatchObject:
        return await kept(request).cancel(batch_id)

    return router


def _page(ids: Sequence[str], limit: int, after: str | None) -> tuple[Sequence[str], bool]:
    """Up to `limit` ids behind `after`, and whether there are more. Raises `ProblemError` for an unknown one."""
    if after is not None and after not in ids:
        raise ProblemError(HTTPStatus.NOT_FOUND, f"after: there is no {after!r:.100}: it is wrong, or was removed")
    start = 0 if after is None else ids.index(after) + 1
    return ids[start : start + limit], len(ids) > start + limit
