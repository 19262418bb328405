"""Classes with constructors, registered with Modal's own client and made by its container's own code."""

from collections.abc import Callable
from typing import Any

import modal
import pytest
from modal._runtime.user_code_imports import get_user_class_instance

from modalkit.modal_config import ModalConfig
from modalkit.modal_service import ModalServer, ModalService
from modalkit.service.queue_backends import InMemoryBackend, QueueBackend
from tests.support.length_model import LengthPipeline
from tests.support.modal_objects import inner

MakeConfig = Callable[..., ModalConfig]


# `serialized` only lets a class be registered that is defined in a test.


def in_a_container(registered: Any, **parameters: Any) -> Any:
    """The instance that Modal makes in a container of the class."""
    return get_user_class_instance(inner(registered), (), parameters)


class SentimentService(ModalService):
    inference_implementation = LengthPipeline

    def __init__(self, queue_backend: QueueBackend | None = None) -> None:
        super().__init__(queue_backend=queue_backend)
        self.model_name = "sentiment-analyzer"


def test_the_documented_class_is_registered_and_constructed(make_config: MakeConfig) -> None:
    app, modal_config = modal.App("app"), make_config()

    @app.cls(**modal_config.get_app_cls_settings(), serialized=True)
    class SentimentApp(SentimentService):
        modal_utils: ModalConfig = modal_config

    service: Any = SentimentApp()
    assert service.model_name == "sentiment-analyzer"
    assert service.queue_backend is None
    in_container = in_a_container(SentimentApp)
    assert in_container.model_name == "sentiment-analyzer"
    assert in_container.configuration() is modal_config


def test_two_levels_of_constructors_both_run(make_config: MakeConfig) -> None:
    class Louder(SentimentService):
        def __init__(self, volume: int = 11) -> None:
            super().__init__()
            self.volume = volume

    app = modal.App("app")
    registered = app.cls(**make_config().get_app_cls_settings(), serialized=True)(type("Registered", (Louder,), {}))
    instance = in_a_container(registered)
    assert (instance.volume, instance.model_name) == (11, "sentiment-analyzer")


def test_parameters_go_before_what_the_constructor_sets(make_config: MakeConfig) -> None:
    app = modal.App("app")

    class Parameterized(SentimentService):
        model_name: str = modal.parameter(default="the default")
        size: int = modal.parameter(default=1)

        def __init__(self) -> None:
            super().__init__()
            self.was_constructed = True

    registered: Any = app.cls(**make_config().get_app_cls_settings(), serialized=True)(Parameterized)
    given, default = in_a_container(registered, model_name="given", size=3), in_a_container(registered)
    assert (given.model_name, given.size, given.was_constructed) == ("given", 3, True)
    assert (default.model_name, default.size, default.was_constructed) == ("the default", 1, True)
    assert registered(model_name="here").model_name == "here"


def test_a_constructor_that_another_base_brings_along_runs_too(make_config: MakeConfig) -> None:
    class Counter:
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.count = 7

    class Counting(Counter, SentimentService):
        pass

    registered = modal.App("app").cls(**make_config().get_app_cls_settings(), serialized=True)(Counting)
    instance = in_a_container(registered)
    assert (instance.count, instance.model_name) == (7, "sentiment-analyzer")


def test_a_server_class_may_have_a_constructor(make_config: MakeConfig) -> None:
    class Server(ModalServer):
        inference_implementation = LengthPipeline

        def __init__(self) -> None:
            super().__init__()
            self.model_name = "set"

    registered = modal.App("app").server(port=8000, **make_config().get_server_settings(), serialized=True)(Server)
    assert inner(registered)._get_user_cls()().model_name == "set"  # noqa: SLF001  # Modal's, as its containers do


def test_a_class_that_is_not_registered_is_constructed_as_any_other() -> None:
    backend = InMemoryBackend()
    assert SentimentService(queue_backend=backend).queue_backend is backend
    assert SentimentService(backend).queue_backend is backend
    assert SentimentService.queue_backend is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'queue'"):
        SentimentService(queue=backend)  # type: ignore[call-arg]  # on purpose
