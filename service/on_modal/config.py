"""The configuration in the words of Modal's client: arguments for `app.cls`, `app.function` and `app.server`."""

import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import modal

from modalkit.service.errors import describe_error
from modalkit.service.loading import LoadError
from modalkit.service.on_modal.image import ImagePlan, build_image, config_paths, image_in_container, plan_image
from modalkit.service.settings import AppSettings, CloudBucketMount, DeploymentConfig, ModelSettings, Settings
from modalkit.service.settings.effective import HIDDEN
from modalkit.service.settings.layers import (
    API_KEY_VARIABLE,
    CONFIG_VARIABLE,
    POSTFIX_VARIABLE,
    PREFIX,
    RESERVED_VARIABLES,
)
from modalkit.service.settings.schema import KeyPath, is_secret, known_paths

logger = logging.getLogger(__name__)

DEFAULT_POSTFIX = "-dev"
LISTS_AT_A_CONTAINER = 8
"""At how many inputs Modal starts another container, where the configuration does not say: each may be a batch."""
EXIT_GRACE_S = 30
"""How long a server may take to finish its requests."""


class ModalConfig:
    """What a Modal app is made of, as configured: ``@app.cls(**modal_config.get_app_cls_settings())`` and so on.

    Without `settings` they are loaded, from `environ` (the process's variables if None) and the files that it names;
    that raises `SettingsError`. Nothing here needs a network or a token, neither in a container nor before: Modal
    resolves what it is given when the app is deployed or run. What cannot be sent to Modal (a file that does not
    exist, a volume whose name Modal refuses) raises `LoadError`, with the key, when it is asked for.
    """

    def __init__(self, settings: Settings | None = None, *, environ: Mapping[str, str] | None = None) -> None:
        self._environ = dict(os.environ if environ is None else environ)
        self.settings = Settings.load(environ=self._environ) if settings is None else settings

    @property
    def app_settings(self) -> AppSettings:
        """The service's settings."""
        return self.settings.app_settings

    @property
    def model_settings(self) -> ModelSettings:
        """The models' settings."""
        return self.settings.model_settings

    @property
    def app_name(self) -> str:
        """``app_prefix`` and the variable `MODALKIT_APP_POSTFIX` (``-dev`` where it is not set)."""
        return self.app_settings.app_prefix + self.environment[POSTFIX_VARIABLE]

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables that lead a container to the same settings: every `MODALKIT_…` one of this process.

        `MODALKIT_CONFIG` names the container's copies of the files. The key of this machine's calls is left out.
        """
        # Never empty: Modal makes a secret of it, and there must be as many in the container as here.
        variables = {POSTFIX_VARIABLE: DEFAULT_POSTFIX} | {
            name: value
            for name, value in self._environ.items()
            if name.upper().startswith(PREFIX) and name != API_KEY_VARIABLE
        }
        if not self._is_in_container:
            files = config_paths(self.settings, self._environ, Path.cwd())
            variables |= {CONFIG_VARIABLE: ",".join(file.remote for file in files)} if files else {}
        return variables

    @cached_property
    def volumes(self) -> dict[str, modal.Volume]:
        """The configured volumes by mount path: the same objects at each call, as `reload_volumes` needs them."""
        return {path: _volume(path, name) for path, name in self._deployment.volumes.items()}

    @cached_property
    def cloud_bucket_mounts(self) -> dict[str, modal.CloudBucketMount]:
        """The configured buckets by mount path."""
        return {bucket.mount_point: _bucket_mount(bucket) for bucket in self._deployment.cloud_bucket_mounts}

    def reload_volumes(self) -> bool:
        """Make what was committed to the volumes elsewhere visible here; whether any was reloaded.

        A volume that cannot be (files on it are open) is logged and tried again at the next call; the others are
        reloaded all the same. To be called in a container; blocks, for as long as Modal takes.
        """
        reloaded = False
        for path, volume in self.volumes.items():
            try:
                volume.reload()
            except Exception as error:  # noqa: BLE001  # Modal's, the network's; a later call may succeed
                logger.warning("The volume at %s was not reloaded: %s", path, describe_error(error))
            else:
                reloaded = True
        return reloaded

    def plan_image(self) -> ImagePlan:
        """What `get_image` makes where it is not in a container, as plain data."""
        return plan_image(self.settings, environ=self._environ, folder=Path.cwd())

    def get_image(self) -> modal.Image:
        """The image of all containers: code, dependencies, configuration and models.

        The user's modules that are imported by the time of the first call are part of it.
        """
        return self._image

    def get_app_cls_settings(self) -> dict[str, Any]:
        """Arguments of ``app.cls`` for the class that runs the model; its concurrency is set apart from them."""
        return _given(self._machine() | self._deployment.model_dump(include={"timeout", "region", "retries"}))

    def get_handler_settings(self) -> dict[str, Any]:
        """Arguments of ``app.function`` for the web function: a container without a GPU, volumes or retries."""
        return _given(self._container() | self._deployment.model_dump(include={"timeout", "region"}))

    def get_asgi_app_settings(self) -> dict[str, Any]:
        """Arguments of ``modal.asgi_app``."""
        return {"requires_proxy_auth": self._deployment.secure}

    def get_concurrency_settings(self) -> dict[str, int]:
        """Arguments of ``modal.concurrent``, or ``with_concurrency``, for the class."""
        deployment = self._deployment
        target = deployment.target_concurrent_inputs or LISTS_AT_A_CONTAINER
        return {
            "max_inputs": deployment.max_concurrent_inputs,
            "target_inputs": min(target, deployment.max_concurrent_inputs),
        }

    def get_handler_concurrency_settings(self) -> dict[str, int]:
        """Arguments of ``modal.concurrent`` for the web function."""
        return {"max_inputs": self._deployment.max_concurrent_requests}

    def get_server_settings(self) -> dict[str, Any]:
        """Arguments of ``app.server`` for a class that serves HTTP itself, on the container with the GPU.

        Each of its inputs is one HTTP request, so as many as a web container takes are let in, and Modal starts
        another container from as many as the class takes.
        """
        deployment = self._deployment
        target = deployment.target_concurrent_inputs or deployment.max_concurrent_inputs
        return self._server(self._machine(), target_concurrency=min(target, deployment.max_concurrent_requests))

    def get_web_server_settings(self) -> dict[str, Any]:
        """Arguments of ``app.server`` for a class that serves HTTP on a container without a GPU."""
        # Beyond the most, Modal refuses (429) until another container is there.
        return self._server(self._container(), target_concurrency=max(1, self._deployment.max_concurrent_requests // 2))

    @property
    def _deployment(self) -> DeploymentConfig:
        return self.app_settings.deployment_config

    @property
    def _is_in_container(self) -> bool:
        # A process that a container starts is "local" to Modal, but has this variable, and no local files either.
        return not modal.is_local() or self._environ.get("MODAL_IS_REMOTE") == "1"

    @cached_property
    def _image(self) -> modal.Image:
        return image_in_container(self.settings) if self._is_in_container else build_image(self.plan_image())

    def _container(self) -> dict[str, Any]:
        """Arguments for every container; settings that have the names of Modal's arguments are these."""
        return {
            "image": self.get_image(),
            "env": self.environment,
            "secrets": [modal.Secret.from_name(name) for name in self._deployment.secrets],
        } | self._deployment.model_dump(include={"min_containers", "max_containers", "scaledown_window"})

    def _machine(self) -> dict[str, Any]:
        """Arguments for a container that runs the model."""
        deployment = self._deployment
        return {
            **self._container(),
            **deployment.model_dump(include={"cpu", "memory"}),
            "gpu": deployment.gpu or None,
            "volumes": {**self.volumes, **self.cloud_bucket_mounts},
            "enable_memory_snapshot": deployment.memory_snapshot,
            "experimental_options": {"enable_gpu_snapshot": True} if deployment.gpu_snapshot else None,
        }

    def _server(self, container: dict[str, Any], *, target_concurrency: int) -> dict[str, Any]:
        """Arguments of `app.server` for a class that runs in such a `container`."""
        deployment = self._deployment
        return _given(
            container
            | {
                "startup_timeout": deployment.timeout,
                "compute_region": deployment.region,
                "unauthenticated": not deployment.secure,
                "exit_grace_period": EXIT_GRACE_S,
                "max_concurrency": deployment.max_concurrent_requests,
                "target_concurrency": target_concurrency,
            }
        )


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those that leave it to Modal."""
    return {name: value for name, value in arguments.items() if value is not None}


def _volume(path: str, name: str) -> modal.Volume:
    try:
        return modal.Volume.from_name(name)
    except modal.exception.InvalidError as error:
        raise LoadError(f"app_settings.deployment_config.volumes.{path}: {error}") from error


def _bucket_mount(bucket: CloudBucketMount) -> modal.CloudBucketMount:
    arguments = bucket.model_dump(exclude={"mount_point", "secret"})
    if bucket.secret is not None:
        arguments["secret"] = modal.Secret.from_name(bucket.secret)
    return modal.CloudBucketMount(**arguments)


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
