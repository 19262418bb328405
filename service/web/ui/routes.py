"""The routes of the page. Its files need no key, as the documentation needs none; all that they show does."""

import hashlib
from functools import cache
from http import HTTPStatus
from pathlib import Path as File
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic_core import to_json

from modalkit.service.gateway import Gateway
from modalkit.service.settings import KeyScope
from modalkit.service.validation import documented_model
from modalkit.service.version import VERSION
from modalkit.service.web.answers import JSON
from modalkit.service.web.auth import ApiKeys
from modalkit.service.web.events import EventStream
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.ui.samples import Sampler

FOLDER = File(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What keeps a browser from running anything but the files of the page, whatever the data that it shows hold."""


def add_page(app: FastAPI, gateway: Gateway, keys: ApiKeys) -> None:
    """Add the page at ``/`` and ``/ui``, its files, and what it is told of `gateway`."""
    files = {file.name: _answer(file) for file in FOLDER.iterdir()}
    sampler = Sampler(gateway)

    async def file(request: Request, name: str = "index.html") -> Response:
        if name not in files:
            raise ProblemError(HTTPStatus.NOT_FOUND, f"the page has no file {name!r:.100}")
        headers, content = files[name]
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    async def page(request: Request) -> Response:
        return await file(request)

    @cache
    def described() -> bytes:
        return to_json(
            {
                "version": VERSION,
                "key_header": keys.header if keys.are_asked_for else None,
                "can_retry": gateway.jobs.administration is not None,
                "models": [
                    {"name": name, "schema": documented_model(model.input_model).model_json_schema()}
                    for name, model in gateway.models.items()
                ],
            }
        )

    async def service() -> Response:
        return Response(described(), media_type=JSON)

    async def events() -> Response:
        return EventStream(sampler.watch())

    def get(path: str, endpoint: Any, **more: Any) -> None:
        app.add_api_route(path, endpoint, include_in_schema=False, **more)

    get("/", page)
    get("/ui", page)
    get("/ui/events", events, dependencies=keys.requires(KeyScope.METRICS))
    get("/ui/service", service)
    get("/ui/{name}", file)


def _answer(file: File) -> tuple[dict[str, str], bytes]:
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return HEADERS | {"Content-Type": f"{MEDIA_TYPES[file.suffix]}; charset=utf-8", "ETag": etag}, content
