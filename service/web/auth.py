"""Authentication by an API key, compared in constant time."""

import hmac
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from http import HTTPStatus

import anyio.lowlevel
from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from modalkit.service.loading import LoadError
from modalkit.service.settings import AuthConfig
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.ssm_key import SsmKey, header_bytes


class ApiKey:
    """The key that requests must carry in the header `header`.

    `opened` is the context in which requests are checked; it keeps a key in AWS SSM up to date, and raises `LoadError`.
    `refresh` reads the key again, because a request has another one; `expected` is then called once more.
    """

    def __init__(
        self,
        header: str,
        expected: Callable[[], bytes | None],
        opened: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        refresh: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
    ) -> None:
        self._header = header
        self._is_bearer = header.lower() == "authorization"
        self._expected = expected
        self.opened = opened
        self._refresh = refresh
        scheme = HTTPBearer(auto_error=False) if self._is_bearer else APIKeyHeader(name=header, auto_error=False)
        self.dependencies = [Depends(scheme), Depends(self.check)]
        """`check` as dependencies of FastAPI, of which the first documents the header."""

    async def check(self, request: Request) -> None:
        """Raise `ProblemError` for a request without the key. It does not wait where the key is right."""
        key = request.headers.get(self._header, "")
        if self._is_bearer:
            kind, _, key = key.partition(" ")
            key = key.strip(" \t") if kind.lower() == "bearer" else ""
        if key:
            sent = key.encode("latin-1")  # Starlette decodes headers as Latin-1
            if self._is_right(sent):
                return
            await self._refresh()
            if self._is_right(sent):
                return
        problem = "the API key is wrong" if key else "the API key is missing"
        form = "Authorization: Bearer <key>" if self._is_bearer else f"{self._header}: <key>"
        detail = f"{problem}: send it as the header '{form}'"
        raise ProblemError(HTTPStatus.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})

    def _is_right(self, sent: bytes) -> bool:
        key = self._expected()
        if key is None:
            # Without the lifespan the key was not read; then no request is let in.
            raise ProblemError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the API key has not been read yet; the server must run the application's lifespan (ASGI)",
            )
        return hmac.compare_digest(sent, key)


def require_api_key(config: AuthConfig) -> ApiKey | None:
    """The configured key, or None where none is configured.

    Raises `LoadError` for a key that no header can carry, and where aiobotocore or the region for AWS SSM is missing.
    """
    if config.ssm_key is not None:
        in_ssm = SsmKey(config.ssm_key, region=config.ssm_region, refresh_s=config.ssm_refresh_seconds)
        return ApiKey(config.auth_header, lambda: in_ssm.value, in_ssm.opened, in_ssm.refresh)
    if config.api_key is None:
        return None
    try:
        key = header_bytes(config.api_key.get_secret_value())
    except ValueError as error:
        raise LoadError(f"app_settings.auth_config.api_key: {error}") from None
    return ApiKey(config.auth_header, lambda: key)
