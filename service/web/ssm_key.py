"""An API key in AWS Systems Manager (SSM), which may change while the service runs."""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.aws import aws_answer, aws_clients
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
    "NoCredentialsError": _CREDENTIALS,
    "ParameterNotFound": "create it in this region, or correct the name or app_settings.auth_config.ssm_region",
    "PartialCredentialsError": _CREDENTIALS,
    "UnrecognizedClientException": _CREDENTIALS,
}


async def _wait(wanted: anyio.Event, seconds: float) -> None:
    with anyio.move_on_after(seconds):
        await wanted.wait()


class SsmKey:
    """The key in a parameter of AWS SSM, which `setting` names. Needs the extra ``aws``, and asyncio.

    It is read when `opened` is entered, and then every `refresh_s` seconds. If it cannot be read again, the last key
    stays valid; the error is logged, and the read is retried with backoff. Credentials, and the region where `region`
    is None, come from where AWS's tools look for them. `clock` returns seconds, from any start. Raises `LoadError` if
    aiobotocore is not installed, or no region is found.
    """

    def __init__(
        self,
        name: str,
        *,
        setting: str = SSM_KEY,
        region: str | None = None,
        refresh_s: float = 300.0,
        clock: Callable[[], float] = anyio.current_time,
        wait: Callable[[anyio.Event, float], Awaitable[None]] = _wait,
    ) -> None:
        region, self._create_client = aws_clients(
            "ssm",
            region,
            error_class=LoadError,
            needed_by=setting,
            extra="aws",
            setting="app_settings.auth_config.ssm_region",
            read_timeout_s=5,
        )
        self._name = name
        self._setting = setting
        self._place = f"parameter {name!r} of AWS SSM in {region}"
        self._refresh_s = refresh_s
        self._clock = clock
        self._wait = wait
        # All mutable state, besides the client.
        self.digest: bytes | None = None
        """The digest of the key of the last read; None before the first read."""
        self._wanted = anyio.Event()  # set from when a read is wanted until its end
        self._was_read = anyio.Event()  # set at the end of the read
        self._next_wrong_key_read_at = float("-inf")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Read the key (raises `LoadError`), then read it again at intervals until the context is left."""
        if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
            raise LoadError(f"{self._setting} needs the event loop of asyncio; it does not run on trio")
        client = self._create_client()
        with self._explained():
            self._client = await client.__aenter__()
        try:
            self.digest = await self._read()
            self._wanted, self._was_read = anyio.Event(), anyio.Event()
            async with plain_task_group() as task_group:
                task_group.start_soon(self._refresh_forever)
                try:
                    yield
                finally:
                    task_group.cancel_scope.cancel()
        finally:
            self._was_read.set()
            with anyio.CancelScope(shield=True):
                await client.__aexit__(None, None, None)

    async def refresh(self) -> None:
        """Have the key read again, because a request has another one; takes at most `READ_S` seconds.

        Does nothing within `WRONG_KEY_INTERVAL_S` after the last read that it caused. Raises nothing.
        """
        if not self._wanted.is_set():
            now = self._clock()
            if now < self._next_wrong_key_read_at:
                return
            self._next_wrong_key_read_at = now + WRONG_KEY_INTERVAL_S
            self._wanted.set()
        await self._was_read.wait()

    async def _refresh_forever(self) -> None:
        """Read the key at intervals and when it is wanted, in a task of its own: those who want it may be cancelled."""
        failures = 0
        while True:
            retry_s = backoff_with_jitter(failures) if failures else self._refresh_s
            await self._wait(self._wanted, min(retry_s, self._refresh_s))
            self._wanted.set()
            try:
                digest = await self._read()
            except LoadError as error:
                failures += 1
                logger.warning("The API key cannot be read again; the last one stays valid. %s", error)
            else:
                failures = 0
                if digest != self.digest:
                    logger.info("The API key in %s has changed", self._place)
                self.digest = digest
            self._was_read.set()
            self._wanted, self._was_read = anyio.Event(), anyio.Event()

    async def _read(self) -> bytes:
        with self._explained():
            with anyio.fail_after(READ_S):
                answer = await self._client.get_parameter(Name=self._name, WithDecryption=True)
            parameter = answer["Parameter"]
            if parameter["Type"] == "StringList":
                raise ValueError("it is a StringList; make it a SecureString (or a String) that holds one key")
            return key_digest(parameter["Value"])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn every error of AWS into a `LoadError` with the place, the reason and the remedy."""
        try:
            yield
        except Exception as error:
            code, message = aws_answer(error)
            if code:
                reason = f"AWS answers {code}: {message.rstrip('.')}"
            elif isinstance(error, TimeoutError):
                reason = f"no answer within {READ_S:g} s"
            else:
                reason = str(error) if isinstance(error, ValueError) else describe_error(error)
            remedy = _REMEDIES.get(code or type(error).__name__)
            raise LoadError(f"{self._setting}: {self._place}: {reason}{f'; {remedy}' if remedy else ''}") from error


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


_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(_DIGEST_PREFIX + r"([0-9A-Fa-f]{64})")


def key_digest(key: str) -> bytes:
    """The SHA-256 of a key as a header carries it, or the one that a text ``sha256:<64 digits>`` gives in its place.

    Raises `ValueError`, which does not show the key, as `header_bytes` does, and for ``sha256:`` before no hash.
    """
    given = _DIGEST.fullmatch(key.strip())
    if given is None and key.strip().startswith(_DIGEST_PREFIX):
        raise ValueError(
            f"it begins with {_DIGEST_PREFIX} and is no hash: give the 64 hexadecimal digits after it that "
            '`printf %s "$KEY" | sha256sum` prints, or a key that begins otherwise'
        )
    return bytes.fromhex(given[1]) if given else hashlib.sha256(header_bytes(key)).digest()
