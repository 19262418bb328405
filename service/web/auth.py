"""Who may call: an API key, compared in constant time."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from service.loading import LoadError
from service.settings import AuthConfig
from service.web.problems import ProblemError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The key that a request must carry."""

    check: Callable[[Request], None]
    """Raises `ProblemError` for a request without the key."""
    dependency: Callable[..., Awaitable[None]]
    """The same as a dependency of FastAPI's, which documents where the key belongs."""


def require_api_key(config: AuthConfig) -> ApiKey | None:
    """The check of the configured key, or None where everybody may call.

    Raises `LoadError` for a key that is to come from where this version cannot read it.
    """
    if config.ssm_key is not None:
        raise LoadError(
            "app_settings.auth_config.ssm_key: keys in AWS SSM are not part of this version; use api_key instead"
        )
    if config.api_key is None:
        return None
    expected = config.api_key.get_secret_value().encode()
    is_bearer = config.auth_header.lower() == "authorization"
    scheme: Any = HTTPBearer(auto_error=False) if is_bearer else APIKeyHeader(name=config.auth_header, auto_error=False)
    remedy = "the header 'Authorization: Bearer <key>'" if is_bearer else f"the header '{config.auth_header}: <key>'"

    def check(request: Request) -> None:
        key = request.headers.get(config.auth_header)
        if is_bearer and key is not None:
            kind, _, key = key.partition(" ")
            key = key.strip() if kind.lower() == "bearer" else None
        if not key or not hmac.compare_digest(key.encode(), expected):
            problem = "the API key is wrong" if key else "the API key is missing"
            raise ProblemError(HTTPStatus.UNAUTHORIZED, f"{problem}: send it as {remedy}", WWW_Authenticate="Bearer")

    # A coroutine function, as FastAPI would run another one in a thread for each request.
    async def dependency(request: Request, _: Annotated[Any, Depends(scheme)]) -> None:
        check(request)

    return ApiKey(check, dependency)
