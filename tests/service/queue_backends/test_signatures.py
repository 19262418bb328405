"""Signatures of webhooks, and the check of a receiver."""

import base64

import pytest

from modalkit.service.queue_backends import WebhookVerificationError, verify_webhook
from modalkit.service.queue_backends.webhook import sign, signing_key

# The example that the libraries of the Standard Webhooks project test themselves with.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1614265330
BODY = '{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HEADERS = {"webhook-id": MESSAGE_ID, "webhook-timestamp": str(TIMESTAMP), "webhook-signature": SIGNATURE}
OTHER = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="


def test_the_signature_is_that_of_the_standard() -> None:
    assert sign(signing_key(SECRET), MESSAGE_ID, str(TIMESTAMP), BODY.encode()) == SIGNATURE


@pytest.mark.parametrize(
    "secret", [SECRET, SECRET.removeprefix("whsec_"), base64.b64decode(SECRET.removeprefix("whsec_"))]
)
@pytest.mark.parametrize("body", [BODY, BODY.encode()])
def test_a_genuine_webhook_is_verified_and_tells_its_job(secret: str | bytes, body: str | bytes) -> None:
    assert verify_webhook(secret, HEADERS, body, now=TIMESTAMP + 299) == MESSAGE_ID
    titled = {name.title(): value for name, value in HEADERS.items()}
    assert verify_webhook(secret, titled, body, now=TIMESTAMP - 299) == MESSAGE_ID


def test_one_of_several_signatures_suffices() -> None:
    headers = {**HEADERS, "webhook-signature": f"{OTHER} v1a,abc ü {SIGNATURE} {OTHER}"}
    assert verify_webhook(SECRET, headers, BODY, now=TIMESTAMP) == MESSAGE_ID


@pytest.mark.parametrize(
    ("changed", "body", "problem"),
    [
        ({"webhook-id": ""}, BODY, "header webhook-id is missing"),
        ({"webhook-timestamp": ""}, BODY, "header webhook-timestamp is missing"),
        ({"webhook-signature": ""}, BODY, "header webhook-signature is missing"),
        ({"webhook-timestamp": "soon"}, BODY, "is no number of seconds"),
        ({"webhook-timestamp": "1e9"}, BODY, "is no number of seconds"),
        ({"webhook-signature": OTHER}, BODY, "does not match"),
        ({"webhook-signature": SIGNATURE.removeprefix("v1,")}, BODY, "does not match"),
        ({"webhook-signature": SIGNATURE.replace("v1,", "v2,")}, BODY, "does not match"),
        ({"webhook-id": "msg_other"}, BODY, "does not match"),
        ({"webhook-timestamp": str(TIMESTAMP + 1)}, BODY, "does not match"),
        ({}, BODY + " ", "does not match"),
    ],
)
def test_anything_changed_is_refused(changed: dict[str, str], body: str, problem: str) -> None:
    with pytest.raises(WebhookVerificationError, match=problem):
        verify_webhook(SECRET, {**HEADERS, **changed}, body, now=TIMESTAMP)


@pytest.mark.parametrize("off_s", [-301, 301])
def test_an_old_webhook_is_refused_unless_its_age_is_tolerated(off_s: int) -> None:
    with pytest.raises(WebhookVerificationError, match="more than 300 s off"):
        verify_webhook(SECRET, HEADERS, BODY, now=TIMESTAMP + off_s)
    assert verify_webhook(SECRET, HEADERS, BODY, tolerance_s=400, now=TIMESTAMP + off_s) == MESSAGE_ID
    with pytest.raises(WebhookVerificationError, match="it is old"):
        verify_webhook(SECRET, HEADERS, BODY)


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("my secret", "must be base64"),
        ("whsec_ä", "must be base64"),
        ("whsec_", "at least 24 bytes once decoded, not 0"),
        ("c2hvcnQ=", "at least 24 bytes once decoded, not 5"),
        (b"short", "not 5"),
    ],
)
def test_a_secret_that_is_none_is_refused(secret: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        signing_key(secret)
