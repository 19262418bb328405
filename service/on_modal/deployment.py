"""What a deployment sends to Modal, as plain data for people to read."""

from typing import Any

from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.settings import Settings
from modalkit.service.settings.layers import PREFIX, RESERVED_VARIABLES
from modalkit.service.settings.schema import KeyPath, is_secret, known_paths

HIDDEN = "(hidden)"


def describe_deployment(config: ModalConfig) -> dict[str, Any]:
    """Every setting that a deployment of the configured service sends to Modal; needs neither network nor token.

    Secrets appear by their names, and variables that hold a secret setting without their values.
    """
    return {
        "app": config.app_name,
        "class": {
            "settings": _plain(config.get_app_cls_settings(), config),
            "concurrency": config.get_concurrency_settings(),
            "parameters": {"model_name": list(config.model_settings.model_entries)},
        },
        "web_function": {
            "settings": _plain(config.get_handler_settings(), config),
            "concurrency": config.get_handler_concurrency_settings(),
            "asgi_app": config.get_asgi_app_settings(),
        },
        "image": list(config.plan_image().steps()),
    }


def _plain(arguments: dict[str, Any], config: ModalConfig) -> dict[str, Any]:
    """Arguments of a decorator of Modal's, with names for Modal's objects."""
    deployment = config.app_settings.deployment_config
    plain = arguments | {
        "image": "see below",
        "env": {name: HIDDEN if _holds_secret(name) else value for name, value in sorted(config.environment.items())},
        "secrets": list(deployment.secrets),
    }
    if "volumes" in arguments:
        plain["volumes"] = {path: {"volume": name} for path, name in deployment.volumes.items()} | {
            bucket.mount_point: bucket.model_dump(exclude={"mount_point"}, exclude_defaults=True)
            for bucket in deployment.cloud_bucket_mounts
        }
    return plain


def _holds_secret(variable: str) -> bool:
    """Whether the variable sets a secret, or a section that has one."""
    if variable in RESERVED_VARIABLES:
        return False
    path: KeyPath = tuple(variable[len(PREFIX) :].lower().split("__"))
    below = [known for known in known_paths(Settings) if known[: len(path)] == path]
    return any(is_secret(Settings, known) for known in (path, *below))
