"""An API key that AWS Systems Manager (SSM) keeps, and that may change while the service runs."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from modalkit.batching.task_groups import plain_task_group
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

    It is read when `opened` is entered, and every `refresh_s` seconds while that lasts. Where it cannot be read again
    the last key stays valid, whatever the reason; that is logged, and tried again with backoff. Credentials, and the
    region where `region` is None, come from where AWS's tools look for them. `clock` gives seconds, from any start.
    Raises `LoadError` if aiobotocore is not installed, or no region is found.
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
        try:
            # Not at the top: the library is optional.
            from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # ships no types
            from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types
        except ImportError as error:
            raise LoadError(
                f"{SSM_KEY} needs aiobotocore ({error}); install it: pip install 'modalkit[aws]'"
            ) from error
        session = get_session()
        region = _configured_region(session) if region is None else region
        config = AioConfig(
            connect_timeout=3,
            read_timeout=5,
            # The one repetition is for a connection that AWS closed while it was idle.
            retries={"mode": "standard", "total_max_attempts": 2},
            warm_up_loader_caches=True,  # reads the description of SSM in a thread, not in the event loop
        )
        self._create_client: Callable[[], AbstractAsyncContextManager[Any]] = lambda: session.create_client(
            "ssm", region_name=region, config=config
        )
        self._name = name
        self._place = f"parameter {name!r} of AWS SSM in {region}"
        self._refresh_s = refresh_s
        self._clock = clock
        self._sleep = sleep
        # All mutable state.
        self._value: bytes | None = None
        self._client: Any = None
        self._task_group: TaskGroup | None = None  # owns every reading but the first
        self._reading: anyio.Event | None = None  # set when the reading under way is over
        self._failures = 0
        self._wrong_keys_count_from = float("-inf")

    @property
    def value(self) -> bytes | None:
        """The key as it was last read, in the form of `header_bytes`, or None before the first time."""
        return self._value

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Read the key, then keep it fresh until the context is left. Raises `LoadError` if it cannot be read."""
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
                self._task_group.start_soon(self._refresh_forever)
                try:
                    yield
                finally:
                    self._task_group.cancel_scope.cancel()
        finally:
            self._task_group = None
            with anyio.CancelScope(shield=True):
                await client.__aexit__(None, None, None)

    async def refresh(self) -> None:
        """Wait until the key is read again, because of a request with another one; at most `READ_S` seconds.

        Does nothing within `WRONG_KEY_INTERVAL_S` of the last time that it had the key read. Raises nothing.
        """
        if self._task_group is None:
            return
        if self._reading is None:
            now = self._clock()
            if now < self._wrong_keys_count_from:
                return
            self._wrong_keys_count_from = now + WRONG_KEY_INTERVAL_S
        await self._start_reading(self._task_group).wait()

    async def _refresh_forever(self) -> None:
        while True:
            retry_s = backoff_with_jitter(self._failures) if self._failures else self._refresh_s
            await self._sleep(min(retry_s, self._refresh_s))
            if self._task_group is not None:
                await self._start_reading(self._task_group).wait()

    def _start_reading(self, task_group: TaskGroup) -> anyio.Event:
        """One reading for all who want one; in a task of its own, since any of them may be cancelled."""
        if self._reading is None:
            self._reading = anyio.Event()
            task_group.start_soon(self._read_again, self._reading)
        return self._reading

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
        """Turn whatever goes wrong between us and AWS into a `LoadError` that says where, why, and the remedy."""
        try:
            yield
        except Exception as error:
            raise LoadError(f"{SSM_KEY}: {self._place}: {_reason(error)}") from error


def _configured_region(session: Any) -> str:
    """The region of the environment or of AWS's configuration file. Raises `LoadError` where there is none."""
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # ships no types

    try:
        # AWS_REGION is what AWS's other SDKs read, and what Modal's own form for AWS credentials asks for.
        region = session.get_config_variable("region") or os.environ.get("AWS_REGION")
    except BotoCoreError as error:
        raise LoadError(f"{SSM_KEY}: the region of AWS SSM cannot be found: {error}") from error
    if not region:
        raise LoadError(
            f"{SSM_KEY}: no region of AWS SSM is configured: set app_settings.auth_config.ssm_region or the variable "
            "AWS_REGION"
        )
    return str(region)


def _reason(error: Exception) -> str:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

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
