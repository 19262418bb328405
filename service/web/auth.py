"""Who may call: an API key, compared in constant time."""

import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.loading import LoadError
from service.settings import AuthConfig
from service.web.problems import ProblemError


def require_api_key(config: AuthConfig) -> Callable[..., Awaitable[None]] | None:
    """The dependency that refuses requests without the configured key, or None where everybody may call.

    Raises `LoadError` for a key that is to come from where this version cannot read it.
    """
    if config.ssm_key is not None:
        raise LoadError(
            "app_settings.auth_config.ssm_key: keys in AWS SSM are not part of this version; use api_key instead"
        )
    if config.api_key is None:
        return None
    expected = config.api_key.get_secret_value().encode()

    def check(key: str | None, remedy: str) -> None:
        if key is None or not hmac.compare_digest(key.encode(), expected):
            problem = "the API key is missing" if key is None else "the API key is wrong"
            raise ProblemError(HTTPStatus.UNAUTHORIZED, f"{problem}: send it as {remedy}", WWW_Authenticate="Bearer")

    if config.auth_header.lower() == "authorization":
        bearer = HTTPBearer(auto_error=False)

        # A coroutine function, as FastAPI would run another one in a thread for each request.
        async def check_bearer(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
            check(credentials.credentials if credentials else None, "the header 'Authorization: Bearer <key>'")

        return check_bearer
    header = APIKeyHeader(name=config.auth_header, auto_error=False)

    async def check_header(key: Annotated[str | None, Depends(header)]) -> None:
        check(key, f"the header '{config.auth_header}: <key>'")

    return check_header
