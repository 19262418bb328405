"""What goes into the container's image, as plain data: made without Modal, shown by a dry run, and tested as it is.

Also how each configured model gets there: copied or downloaded into the image, or by other ways.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from modalkit.pipelines.classifier_settings import BUNDLED
from modalkit.service.loading import current_name
from modalkit.service.settings import ModelEntry, Settings

SOURCE_FOLDER = "/root"
"""Where Modal's containers look for Python modules, whatever the working directory."""

NO_CACHES = ("**/__pycache__", "**/*.pyc", "**/.*")

# As modalkit.pipelines.loading has it, which brings in torch; a dash in front would be an option of the command.
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_NOT_THE_MODEL = ("**/.git", "**/.cache")
_LOADS_FROM_THE_HUB = ("modalkit.pipelines.sentiment", "SentimentPipeline")


@dataclass(frozen=True)
class LocalPath:
    """A local file or folder and its absolute place in the container; of a folder, what matches `ignore` stays out."""

    local: Path
    remote: str
    is_folder: bool
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Download:
    """A model of the hub that is downloaded while the image is built."""

    name: str
    revision: str | None = None

    def command(self) -> tuple[str, ...]:
        """The words of the shell command."""
        return ("hf", "download", self.name, *(() if self.revision is None else ("--revision", self.revision)))


@dataclass(frozen=True)
class ImagePlan:
    """An image, in the order of the fields: what is built, and last the local files, which no build step may follow."""

    base: str
    workdir: str
    env: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[str, ...] = ()
    downloads: tuple[str, ...] = ()
    """Shell commands that download models; they get the `secrets`."""
    secrets: tuple[str, ...] = ()
    """Names of Modal secrets."""
    run_commands: tuple[str, ...] = ()
    local_paths: tuple[LocalPath, ...] = ()

    def steps(self) -> Iterator[dict[str, Any]]:
        """Each step, for people: the method of `modal.Image` with its argument, and what else it is given."""
        yield {"from_registry": self.base}
        yield {"workdir": self.workdir}
        if self.env:
            yield {"env": dict(self.env)}
        if self.requirements:
            yield {"uv_pip_install": list(self.requirements)}
        if self.downloads:
            yield {"run_commands": list(self.downloads)} | ({"secrets": list(self.secrets)} if self.secrets else {})
        if self.run_commands:
            yield {"run_commands": list(self.run_commands)}
        for path in self.local_paths:
            method = "add_local_dir" if path.is_folder else "add_local_file"
            yield {method: str(path.local), "remote_path": path.remote} | (
                {"ignore": list(path.ignore)} if path.ignore else {}
            )


def models(settings: Settings, folder: Path) -> tuple[tuple[LocalPath, ...], tuple[Download, ...]]:
    """The folders to copy and the models to download, so that each `model_path` leads to the same model there as here.

    Nothing for a model that is bundled, lies on a volume, a bucket or a mounted folder, or cannot be found here: it
    may be part of the base image. Nothing at all without `bake_models`.
    """
    if not settings.app_settings.build_config.bake_models:
        return (), ()
    elsewhere = _mounted(settings)
    copies: dict[LocalPath, None] = {}
    downloads: dict[Download, None] = {}
    for entry in settings.model_settings.model_entries.values():
        match _source(entry, settings, folder, elsewhere):
            case LocalPath() as copy:
                copies[copy] = None
            case Download() as download:
                downloads[download] = None
    return tuple(copies), tuple(downloads)


def _source(
    entry: ModelEntry, settings: Settings, folder: Path, elsewhere: Iterable[str]
) -> LocalPath | Download | None:
    arguments = entry.arguments()
    path, revision = arguments.get("model_path"), arguments.get("revision")
    if not isinstance(path, str) or path in ("", BUNDLED):
        return None
    workdir = settings.app_settings.build_config.workdir
    repository = str(settings.model_settings.local_model_repository_folder)
    # In the order in which the pipeline looks for it.
    for start in (repository, ""):
        remote = in_container(path, in_container(start, workdir))
        if any(PurePosixPath(remote).is_relative_to(root) for root in elsewhere):
            return None
        local = (folder / Path(start) / Path(path).expanduser()).resolve()
        if local.is_dir():
            return LocalPath(local, remote, is_folder=True, ignore=_NOT_THE_MODEL)
    module, _, name = entry.pipeline.partition(":")
    loads_from_the_hub = (current_name(module, folder), name) == _LOADS_FROM_THE_HUB
    is_on_the_hub = loads_from_the_hub and _HUB_NAME.fullmatch(path) is not None
    if not is_on_the_hub or _hub_cache_is_mounted(settings.app_settings.build_config.env, elsewhere):
        return None
    return Download(path, None if revision is None else str(revision))


def in_container(path: str, start: str) -> str:
    """The place in the container of a path that the configuration means relative to `start`."""
    if path == "~" or path.startswith("~/"):
        path = SOURCE_FOLDER + path[1:]
    return posixpath.normpath(posixpath.join(start, path))


def _mounted(settings: Settings) -> list[str]:
    deployment, workdir = settings.app_settings.deployment_config, settings.app_settings.build_config.workdir
    return [
        *deployment.volumes,
        *(bucket.mount_point for bucket in deployment.cloud_bucket_mounts),
        *(in_container(mount.remote_path, workdir) for mount in deployment.mounts if mount.type == "dir"),
    ]


def _hub_cache_is_mounted(env: Mapping[str, str], elsewhere: Iterable[str]) -> bool:
    """Whether downloads are kept on a volume, which would hide those in the image."""
    home = env.get("HF_HOME", f"{SOURCE_FOLDER}/.cache/huggingface")
    cache = PurePosixPath(env.get("HF_HUB_CACHE", f"{home}/hub"))
    return any(cache.is_relative_to(root) for root in elsewhere)
