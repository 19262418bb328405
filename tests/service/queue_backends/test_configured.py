"""The queue backends that a configuration names."""

from typing import Any

import pytest

from modalkit.service.loading import LoadError, load_queue_backend
from modalkit.service.queue_backends import InMemoryBackend, QueueNameError, RoutingBackend, SQSBackend, WebhookBackend
from modalkit.service.settings import QueueConfig
from tests.support.sqs_server import forget_aws_settings

made: list["Mine"] = []


class Mine(InMemoryBackend):
    def __init__(self) -> None:
        super().__init__()
        made.append(self)


def loaded(**config: Any) -> Any:
    return load_queue_backend(QueueConfig.model_validate(config))


def test_each_backend_is_made_from_its_settings() -> None:
    assert loaded(backend="none") is None
    assert isinstance(loaded(backend="memory"), InMemoryBackend)
    assert isinstance(loaded(backend="sqs", sqs={"region": "eu-west-1", "message_group_id": "results"}), SQSBackend)
    webhook = loaded(backend="webhook", webhook={"allowed_hosts": ["localhost:8080"], "allow_private_addresses": True})
    assert isinstance(webhook, WebhookBackend)
    webhook.check_queue_name("http://localhost:8080/")
    assert isinstance(loaded(backend=f"{__name__}:Mine"), Mine)


@pytest.mark.anyio
async def test_routes_share_the_backends_they_lead_to() -> None:
    made.clear()
    mine = f"{__name__}:Mine"
    backend = loaded(
        backend="routing",
        routes={"a_*": mine, "b_*": mine, "drop_*": "none", "https://*": "webhook"},
        webhook={"allowed_hosts": ["hooks.example.com"]},
    )
    assert isinstance(backend, RoutingBackend)
    for name in ("a_1", "b_1", "drop_1"):
        assert await backend.send_message(name, "x")
    assert [each.queue_names() for each in made] == [["a_1", "b_1"]]
    backend.check_queue_name("https://hooks.example.com/results")
    with pytest.raises(QueueNameError):
        backend.check_queue_name("https://example.com/results")
    await backend.aclose()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"backend": "webhook", "webhook": {"allowed_hosts": ["a.example", "b c"]}},
            r"^app_settings.queue_config.backend: webhook cannot be built: allowed_hosts\[1\] must be a host",
        ),
        (
            {"backend": "webhook", "webhook": {"allowed_hosts": ["a.example"], "secret": "s3cret!"}},
            "the secret for webhooks must be base64",
        ),
        ({"backend": "sqs", "sqs": {"message_group_id": "a b"}}, "message_group_id must be"),
        ({"backend": "sqs"}, "sqs cannot be built: SQSBackend: no region of SQS is configured"),
        (
            {"backend": "routing", "routes": {"a*": "json:JSONDecoder"}},
            "queue_config.routes.a*: json:JSONDecoder must be a backend with a method",
        ),
    ],
)
def test_what_cannot_be_built_is_an_error_that_names_the_setting(
    config: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_aws_settings(monkeypatch)
    with pytest.raises(LoadError, match=problem.replace("a*:", r"a\*:")) as raised:
        loaded(**config)
    assert "s3cret" not in str(raised.value)
