"""Results to web servers, as HTTP requests signed after Standard Webhooks 1.0.0 (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from weakref import WeakValueDictionary

import anyio
import httpcore
import httpx

from modalkit.service.errors import ServiceError
from modalkit.service.queue_backends.protocol import QueueBackendError, QueueMessage, UndeliverableError, safe_id
from modalkit.service.queue_backends.sending import ATTEMPT_S, ConnectedBackend, hold, outcomes_of
from modalkit.service.queue_backends.webhook_urls import AllowedURLs, CheckedNetwork, Resolve, shown_queue_name

MAX_CONNECTIONS = 256
MAX_REQUESTS_PER_HOST = 32  # at a time, so that a host that hangs does not block the others
KEEPALIVE_S = 15.0

_TRIED_AGAIN = {408, 425, 429}  # the 4xx answers that may differ for a later attempt
_BROKEN_CONNECTION = (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError)  # by a server's alert, too
_READ_BODY_BYTES = 16_384
_READ_BODY_S = 1.0

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"

MIN_KEY_BYTES = 24


class WebhookVerificationError(ServiceError):
    """Raised when a request was not signed with the key, or is too old."""


class WebhookBackend(ConnectedBackend):
    """Posts each result to the URL that is the queue's name, and to `allowed_hosts` alone (see `AllowedURLs`).

    A request carries ``webhook-id`` (the job's id, the same at each attempt), ``webhook-timestamp`` and, where there
    is a `secret`, ``webhook-signature``: HMAC-SHA256 as in Standard Webhooks, which `verify_webhook` checks. A message
    is delivered when the answer is 2xx. After 4xx other than 408, 425 and 429 it is not sent again; after all other
    answers, redirects included, it is retried later. ``Retry-After`` is ignored, because deliveries have a backoff of
    their own.

    The host's name is looked up once for each connection, all its addresses must be public, and the connection uses
    the address that was checked. Redirects are not followed and proxies not used. `allow_private_addresses` allows
    private addresses and plain http, for receivers in your own network. At most 32 requests run at a time for each
    host and 256 in all, and each takes at most `timeout_s`; a message that waits longer than 25 seconds less
    `timeout_s` for its turn raises `NotSentError`. `resolve` replaces the system's look-up of names, `ssl_context` the
    trusted certificates.

    Runs on asyncio and trio, in one event loop until `aclose`. Raises `ValueError` for invalid hosts and secrets.
    """

    def __init__(
        self,
        *,
        allowed_hosts: Sequence[str],
        secret: str | bytes | None = None,
        allow_private_addresses: bool = False,
        timeout_s: float = 10.0,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s!r}")
        self._urls = AllowedURLs(allowed_hosts, allow_private_addresses=allow_private_addresses)
        self._key = None if secret is None else signing_key(secret)
        self._timeout_s = timeout_s
        self._ssl_context = ssl_context
        self._resolve = resolve
        self._allow_private_addresses = allow_private_addresses
        # The requests of a host keep its limiter, so that a host without requests takes no memory.
        self._limiters = WeakValueDictionary[bytes, anyio.CapacityLimiter]()

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a URL that results may not go to; its host is not looked up.

        The messages of this backend's errors hold only scheme, host and port of a URL.
        """
        self._urls.parse(queue_name)

    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Post messages, a request each, several at a time; returns the outcome of each."""
        pool, connections = await self._connection().get()
        no_limit = anyio.CapacityLimiter(math.inf)  # each waits for its own host, and for a connection
        return await outcomes_of(
            lambda message: self._deliver(pool, connections, message), messages, no_limit, math.inf
        )

    async def _connect(self, stack: AsyncExitStack) -> tuple[httpcore.AsyncConnectionPool, anyio.CapacityLimiter]:
        # httpx's own client would log the whole URL of each request, and cannot be told how to connect.
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._ssl_context or httpx.create_ssl_context(trust_env=False),
            network_backend=CheckedNetwork(self._resolve, allow_private_addresses=self._allow_private_addresses),
            max_connections=MAX_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_S,
        )
        # As many tokens as connections: the timeout of a request starts when it has one.
        return await stack.enter_async_context(pool), anyio.CapacityLimiter(MAX_CONNECTIONS)

    async def _deliver(
        self, pool: httpcore.AsyncConnectionPool, connections: anyio.CapacityLimiter, message: QueueMessage
    ) -> None:
        url = self._urls.parse(message.queue_name)
        shown = shown_queue_name(message.queue_name)
        try:
            body = message.body.encode()
        except UnicodeEncodeError as error:
            raise UndeliverableError(f"{shown}: the message is no Unicode text: {error.reason}") from None
        limiter = self._limiters.setdefault(url.netloc, anyio.CapacityLimiter(MAX_REQUESTS_PER_HOST))
        until_s = anyio.current_time() + ATTEMPT_S - self._timeout_s
        try:
            async with (
                hold(limiter, until_s - anyio.current_time(), f"{shown}: too many messages wait for this host"),
                hold(connections, until_s - anyio.current_time(), f"{shown}: too many messages wait for other hosts"),
            ):
                status = await self._post(pool, url, message, body)
        except TimeoutError:
            raise QueueBackendError(f"{shown}: no answer within {self._timeout_s:g} s") from None
        except (*_BROKEN_CONNECTION, httpcore.TimeoutException) as error:
            raise QueueBackendError(f"{shown}: {type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            is_final = 400 <= status < 500 and status not in _TRIED_AGAIN
            raise (UndeliverableError if is_final else QueueBackendError)(f"{shown} answers {status}")

    async def _post(
        self, pool: httpcore.AsyncConnectionPool, url: httpx.URL, message: QueueMessage, body: bytes
    ) -> int:
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        message_id, timestamp = safe_id(message.job_id), str(int(time.time()))
        headers: list[tuple[str | bytes, str | bytes]] = [
            ("Host", url.netloc),
            ("Content-Type", "application/json"),
            ("User-Agent", "modalkit"),
            (ID_HEADER, message_id),
            (TIMESTAMP_HEADER, timestamp),
        ]
        if message.traceparent is not None:
            headers.append(("traceparent", message.traceparent))
        if self._key is not None:
            headers.append((SIGNATURE_HEADER, sign(self._key, message_id, timestamp, body)))
        async with AsyncExitStack() as stack:
            # The pool takes the time to connect from here, which a host's addresses share.
            limits = {"timeout": {"connect": self._timeout_s}}
            with anyio.fail_after(self._timeout_s):
                response = await stack.enter_async_context(
                    pool.stream("POST", target, headers=headers, content=body, extensions=limits)
                )
            # Only the status counts; the body is read so that the connection can be used again.
            if _body_size(response) <= _READ_BODY_BYTES:
                with anyio.move_on_after(_READ_BODY_S), suppress(*_BROKEN_CONNECTION):
                    await response.aread()
            return response.status


def _body_size(response: httpcore.Response) -> float:
    """The bytes of an answer's body by its headers; infinite where they do not say."""
    if response.status == 204:
        return 0
    return next((int(value) for name, value in response.headers if name.lower() == b"content-length"), math.inf)


def signing_key(secret: str | bytes) -> bytes:
    """The key in `secret`: a text in base64, with or without ``whsec_`` in front, or the bytes themselves.

    Raises `ValueError` for a text that is no base64, and for a key of less than 24 bytes.
    """
    if isinstance(secret, str):
        encoded = secret.removeprefix("whsec_")
        try:
            secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(
                "the secret for webhooks must be base64, with or without whsec_ in front, as made by: "
                "openssl rand -base64 32"
            ) from None
    if len(secret) < MIN_KEY_BYTES:
        raise ValueError(
            f"the secret for webhooks must have at least {MIN_KEY_BYTES} bytes once decoded, not {len(secret)}; make "
            "one with: openssl rand -base64 32"
        )
    return secret


def sign(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """The signature header for a webhook."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def verify_webhook(
    secret: str | bytes,
    headers: Mapping[str, str],
    body: str | bytes,
    tolerance_s: float = 300,
    now: float | None = None,
) -> str:
    """Check that a request was signed with the secret at most `tolerance_s` seconds ago; returns the job's id.

    `body` is the request's body before any parsing. The id is the same at each attempt: a receiver that stores the ids
    it has seen handles no result twice. `now` is in seconds since 1970, by default the present time. Raises
    `WebhookVerificationError`, which says why, and `ValueError` for an invalid secret.
    """
    key = signing_key(secret)
    present = {name.lower(): value for name, value in headers.items()}
    for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER):
        if not present.get(name):
            raise WebhookVerificationError(f"the header {name} is missing")
    message_id, timestamp = present[ID_HEADER], present[TIMESTAMP_HEADER]
    if not (timestamp.isdecimal() and len(timestamp) <= 12):
        raise WebhookVerificationError(f"the header {TIMESTAMP_HEADER} is no number of seconds")
    expected = sign(key, message_id, timestamp, body.encode() if isinstance(body, str) else body).encode()
    given = [each.encode(errors="replace") for each in present[SIGNATURE_HEADER].split(" ")]
    if not any(hmac.compare_digest(expected, each) for each in given):
        raise WebhookVerificationError("the signature does not match: another secret, or a changed body")
    age_s = (time.time() if now is None else now) - int(timestamp)
    if abs(age_s) > tolerance_s:
        raise WebhookVerificationError(
            f"the webhook was sent {age_s:.0f} s ago, more than {tolerance_s:g} s off: it is old, or a clock is wrong"
        )
    return message_id
