"""What Modal's client made of a definition, read from its objects: nothing of it can be asked for without a server."""

from collections.abc import Iterator
from typing import Any

import modal
from modal._utils.async_utils import synchronizer


def inner(wrapped: object) -> Any:
    """The client's own object behind the one that it hands out."""
    translate: Any = synchronizer._translate_in  # noqa: SLF001  # there is no other way, here and below
    return translate(wrapped)


def class_spec(registered: object) -> Any:
    """The resources of a class that `app.cls` registered: GPU, secrets, volumes and so on."""
    return inner(registered)._get_class_service_function()._spec_  # noqa: SLF001


def concurrency(registered: object) -> Any:
    """How many inputs a registered class or function takes at once; None where it is not decorated."""
    wanted = inner(registered)
    if isinstance(registered, modal.Cls):
        wanted = wanted._get_class_service_function()  # noqa: SLF001  # see above
    return wanted._function_info.concurrency_info  # noqa: SLF001  # see above


def method_names(registered: object) -> list[str]:
    """The methods of a registered class that can be called."""
    return sorted(inner(registered)._get_method_names())  # noqa: SLF001  # see above


def web_settings(function: object) -> tuple[Any, Any]:
    """The resources of a registered web function, and how it is reached."""
    return inner(function)._spec_, inner(function)._webhook_config  # noqa: SLF001  # see above


def called_instance(process_request: Any) -> tuple[Any, dict[str, Any]]:
    """The options and the parameters of the instance that a method is of."""
    instance = inner(process_request)._obj  # noqa: SLF001  # see above
    return instance._options, instance._kwargs  # noqa: SLF001  # see above


def image_layers(image: modal.Image) -> list[str]:
    """The methods that made an image, the first one first."""
    return [name for name, _ in _layers(image)][::-1]


def local_files(image: modal.Image) -> dict[str, str]:
    """The files that an image gets from this machine: place in the container, and here."""
    mounts = [mount for _, mount in _layers(image) if mount is not None]
    entries = [entry for mount in mounts for entry in mount.entries]
    return {str(remote): str(local) for entry in entries for local, remote in entry.get_files_to_upload()}


def _layers(image: modal.Image) -> Iterator[tuple[str, Any]]:
    layer = inner(image)
    while layer is not None:
        below = layer._deps() if layer._deps else []  # noqa: SLF001
        name = layer._rep.removeprefix("Image(<function _Image.").partition(".")[0]  # noqa: SLF001
        yield name.removesuffix(")"), next((dep for dep in below if hasattr(dep, "entries")), None)
        layer = below[0] if below else None
