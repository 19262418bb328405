"""Authentication by an API key, compared in constant time."""

import hmac
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from modalkit.service.loading import LoadError
from modalkit.service.settings import AuthConfig
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.ssm_key import SsmKey, header_bytes


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The key that a request must carry."""

    check: Callable[[Request], Awaitable[None]]
    """Raises `ProblemError` for a request without the key. It does not wait where the key is right."""
    dependency: Callable[..., Awaitable[None]]
    """`check` as a dependency of FastAPI, so that OpenAPI documents the header."""
    opened: Callable[[], AbstractAsyncContextManager[None]]
    """The context in which requests are checked; it keeps a key in AWS SSM up to date. Raises `LoadError`."""


def require_api_key(config: AuthConfig) -> ApiKey | None:
    """The check of the configured key, or None where none is configured.

    Raises `LoadError` for a key that no header can carry, and where aiobotocore or the region for AWS SSM is missing.
    """
    if config.ssm_key is not None:
        in_ssm = SsmKey(config.ssm_key, region=config.ssm_region, refresh_s=config.ssm_refresh_seconds)
        return _make(config.auth_header, lambda: in_ssm.value, in_ssm.opened, in_ssm.refresh)
    if config.api_key is None:
        return None
    try:
        key = header_bytes(config.api_key.get_secret_value())
    except ValueError as error:
        raise LoadError(f"app_settings.auth_config.api_key: {error}") from None
    return _make(config.auth_header, lambda: key, nullcontext, None)


def _make(
    header: str,
    expected: Callable[[], bytes | None],
    opened: Callable[[], AbstractAsyncContextManager[None]],
    refresh: Callable[[], Awaitable[None]] | None,
) -> ApiKey:
    is_bearer = header.lower() == "authorization"
    scheme: Any = HTTPBearer(auto_error=False) if is_bearer else APIKeyHeader(name=header, auto_error=False)
    remedy = "the header 'Authorization: Bearer <key>'" if is_bearer else f"the header '{header}: <key>'"

    def is_right(sent: bytes) -> bool:
        key = expected()
        if key is None:
            # Without the lifespan the key was not read; then no request is let in.
            raise ProblemError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the API key has not been read yet; the server must run the application's lifespan (ASGI)",
            )
        return hmac.compare_digest(sent, key)

    async def check(request: Request) -> None:
        key = request.headers.get(header)
        if is_bearer and key is not None:
            kind, _, key = key.partition(" ")
            key = key.strip(" \t") if kind.lower() == "bearer" else None
        if key:
            sent = key.encode("latin-1")  # Starlette decodes headers as Latin-1
            if is_right(sent):
                return
            if refresh is not None:
                await refresh()
                if is_right(sent):
                    return
        problem = "the API key is wrong" if key else "the API key is missing"
        raise ProblemError(HTTPStatus.UNAUTHORIZED, f"{problem}: send it as {remedy}", WWW_Authenticate="Bearer")

    # A coroutine function: FastAPI would run any other function in a thread, for each request.
    async def dependency(request: Request, _: Annotated[Any, Depends(scheme)]) -> None:
        await check(request)

    return ApiKey(check, dependency, opened)
