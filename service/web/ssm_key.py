"""An API key in AWS Systems Manager (SSM), which may change while the service runs."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.aws import aws_clients
from modalkit.service.backoff import backoff_with_jitter
from modalkit.service.errors import describe_error
from modalkit.service.loading import LoadError

logger = logging.getLogger(__name__)

SSM_KEY = "app_settings.auth_config.ssm_key"
READ_S = 10.0
WRONG_KEY_INTERVAL_S = 5.0
"""Minimum seconds between two reads of the parameter that wrong keys cause: guessing must not flood AWS."""

_CREDENTIALS = (
    "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a Modal secret can hold them), or what else AWS's tools look for"
)
_REMEDIES = {
    "AccessDeniedException": "allow ssm:GetParameter on it, and kms:Decrypt on the key that encrypts it",
    "ExpiredTokenException": _CREDENTIALS,
    "InvalidClientTokenId": _CREDENTIALS,
    "InvalidSignatureException": _CREDENTIALS,
    "ParameterNotFound": "create it in this region, or correct the name or app_settings.auth_config.ssm_region",
    "UnrecognizedClientException": _CREDENTIALS,
}


class SsmKey:
    """The key in a parameter of AWS SSM. Needs the extra ``modalkit[aws]``, and asyncio.

    It is read when `opened` is entered, and then every `refresh_s` seconds. If it cannot be read again, the last key
    stays valid; the error is logged, and the read is retried with backoff. Credentials, and the region where `region`
    is None, come from where AWS's tools look for them. `clock` returns seconds, from any start. Raises `LoadError` if
    aiobotocore is not installed, or no region is found.
    """

    def __init__(
        self,
        name: str,
        *,
        region: str | None = None,
        refresh_s: float = 300.0,
        clock: Callable[[], float] = anyio.current_time,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        region, self._create_client = aws_clients(
            "ssm",
            region,
            error_class=LoadError,
            needed_by=SSM_KEY,
            extra="aws",
            setting="app_settings.auth_config.ssm_region",
            read_timeout_s=5,
        )
        self._name = name
        self._place = f"parameter {name!r} of AWS SSM in {region}"
        self._refresh_s = refresh_s
        self._clock = clock
        self._sleep = sleep
        # All mutable state.
        self._value: bytes | None = None
        self._client: Any = None
        self._task_group: TaskGroup | None = None  # owns every read except the first
        self._reading: anyio.Event | None = None  # set at the end of the running read
        self._failures = 0
        self._next_wrong_key_read_at = float("-inf")

    @property
    def value(self) -> bytes | None:
        """The key of the last read, in the form of `header_bytes`; None before the first read."""
        return self._value

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Read the key (raises `LoadError`), then read it again at intervals until the context is left."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise LoadError(f"{SSM_KEY} needs the event loop of asyncio; it does not run on trio") from None
        client = self._create_client()
        with self._explained():
            self._client = await client.__aenter__()
        try:
            self._value = await self._read()
            async with plain_task_group() as self._task_group:
                self._task_group.start_soon(self._refresh_forever, self._task_group)
                try:
                    yield
                finally:
                    self._task_group.cancel_scope.cancel()
        finally:
            self._task_group = None
            with anyio.CancelScope(shield=True):
                await client.__aexit__(None, None, None)

    async def refresh(self) -> None:
        """Read the key again, because a request has another one; takes at most `READ_S` seconds.

        Does nothing within `WRONG_KEY_INTERVAL_S` after the last read that it caused. Raises nothing.
        """
        if self._task_group is None:
            return
        if self._reading is None:
            now = self._clock()
            if now < self._next_wrong_key_read_at:
                return
            self._next_wrong_key_read_at = now + WRONG_KEY_INTERVAL_S
        await self._share_read(self._task_group)

    async def _refresh_forever(self, task_group: TaskGroup) -> None:
        while True:
            retry_s = backoff_with_jitter(self._failures) if self._failures else self._refresh_s
            await self._sleep(min(retry_s, self._refresh_s))
            await self._share_read(task_group)

    async def _share_read(self, task_group: TaskGroup) -> None:
        """One read for all callers that want one, in a task of its own, because any caller may be cancelled."""
        if self._reading is None:
            self._reading = anyio.Event()
            task_group.start_soon(self._read_again, self._reading)
        await self._reading.wait()

    async def _read_again(self, done: anyio.Event) -> None:
        try:
            value = await self._read()
        except LoadError as error:
            self._failures += 1
            logger.warning("The API key cannot be read again; the last one stays valid. %s", error)
        else:
            self._failures = 0
            if value != self._value:
                logger.info("The API key has changed")
            self._value = value
        finally:
            self._reading = None
            done.set()

    async def _read(self) -> bytes:
        with self._explained():
            with anyio.fail_after(READ_S):
                answer = await self._client.get_parameter(Name=self._name, WithDecryption=True)
            parameter = answer["Parameter"]
            if parameter["Type"] == "StringList":
                raise ValueError("it is a StringList; make it a SecureString (or a String) that holds one key")
            return header_bytes(parameter["Value"])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn every error of AWS into a `LoadError` with the place, the reason and the remedy."""
        try:
            yield
        except Exception as error:
            raise LoadError(f"{SSM_KEY}: {self._place}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from botocore.exceptions import (  # type: ignore[import-untyped]  # ships no types
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    if isinstance(error, TimeoutError):
        return f"no answer within {READ_S:g} s"
    if isinstance(error, ClientError):
        answer = error.response.get("Error", {})
        code, message = answer.get("Code", ""), answer.get("Message", "")
        remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
        return f"AWS answers {code}: {message.rstrip('.')}{remedy}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"{error}; {_CREDENTIALS}"
    return str(error) if isinstance(error, BotoCoreError | ValueError) else describe_error(error)


def header_bytes(key: str) -> bytes:
    """The bytes of a header with this key, without the white space around it, which headers cannot carry.

    A file or a secret often ends with a line break. Raises `ValueError`, which does not show the key, for a key that no
    header can carry.
    """
    key = key.strip()
    if not key:
        raise ValueError("it is empty")
    if not key.isprintable():
        raise ValueError("it has a line break or another control character inside, which no header can carry")
    return key.encode()
