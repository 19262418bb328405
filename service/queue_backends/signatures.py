"""Signatures of webhooks after the Standard Webhooks specification 1.0.0 (https://www.standardwebhooks.com)."""

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Mapping

from modalkit.service.errors import ServiceError

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"

MIN_KEY_BYTES = 24
_KEY_PREFIX = "whsec_"
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


class WebhookVerificationError(ServiceError):
    """Raised when a request was not signed with the key, or is too old."""


def signing_key(secret: str | bytes) -> bytes:
    """The key in `secret`: a text in base64, with or without ``whsec_`` in front, or the bytes themselves.

    Raises `ValueError` for a text that is no base64, and for a key of less than 24 bytes.
    """
    if isinstance(secret, str):
        encoded = secret.removeprefix(_KEY_PREFIX)
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
    if not _TIMESTAMP.fullmatch(timestamp):
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
