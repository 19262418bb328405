"""The container's image: planned as plain data, which a dry run shows, and then built of Modal's steps.

The plan says how each configured model gets there: copied or downloaded into the image, or by other ways.
"""

import posixpath
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import modal

from modalkit.pipelines.classifier_settings import BUNDLED
from modalkit.service.loading import LoadError, current_name
from modalkit.service.on_modal.image_code import SOURCE_FOLDER, LocalPath, own_package, own_requirements, user_code
from modalkit.service.settings import BuildConfig, DeploymentConfig, ModelEntry, Settings
from modalkit.service.settings.layers import CONFIG_VARIABLE, DEFAULT_FILE, named_files

_OFFICIAL_PYTHON = re.compile(r"(?:^|/)python:(\d+\.\d+)")
# As modalkit.pipelines.loading has it, which brings in torch; a dash in front would be an option of the command.
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_NOT_THE_MODEL = ("**/.git", "**/.cache")
_LOAD_FROM_THE_HUB = {
    "modalkit.pipelines.embedding": "EmbeddingPipeline",
    "modalkit.pipelines.rerank": "RerankPipeline",
    "modalkit.pipelines.sentiment": "SentimentPipeline",
    "modalkit.pipelines.token_classification": "TokenClassificationPipeline",
    "modalkit.pipelines.zero_shot": "ZeroShotPipeline",
}


@dataclass(frozen=True)
class ImagePlan:
    """An image, in the order of the fields: what is built, and last the local files, which no build step may follow."""

    base: str
    workdir: str
    env: Mapping[str, str]
    requirements: tuple[str, ...]
    downloads: tuple[str, ...]
    """Shell commands that download models; they get the `secrets`, and run before those that change more often."""
    secrets: tuple[str, ...]
    """Names of Modal secrets."""
    run_commands: tuple[str, ...]
    local_paths: tuple[LocalPath, ...]

    def steps(self) -> Iterator[dict[str, Any]]:
        """Each step: the method of `modal.Image` with its argument, or a list of them, and what else it is given.

        Secrets are their names.
        """
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


def config_paths(settings: Settings, environ: Mapping[str, str], folder: Path) -> tuple[LocalPath, ...]:
    """The files of the configuration, each with its place in the container, later ones over earlier ones.

    They are those named in `MODALKIT_CONFIG`, else the working folder's modalkit.yaml if there is one. Raises
    `LoadError` for one that does not exist.
    """
    names = named_files(environ)
    if not names and (folder / DEFAULT_FILE).is_file():
        names = [str(DEFAULT_FILE)]
    start = settings.app_settings.build_config.workdir
    files = [folder / Path(name).expanduser() for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise LoadError(f"{CONFIG_VARIABLE}: there is no file {missing[0]}; create it or correct its name")
    return tuple(
        LocalPath(file, in_container(f"modalkit_config/{number}-{file.name}", start), is_folder=False)
        for number, file in enumerate(files)
    )


def plan_image(settings: Settings, *, environ: Mapping[str, str], folder: Path) -> ImagePlan:
    """What the image holds, for a configuration that was read in the working `folder` with the variables `environ`.

    Looks at local files and at what Python has imported; imports nothing. Raises `LoadError` for a file or a module
    that does not exist, with the key that names it.
    """
    build, deployment = settings.app_settings.build_config, settings.app_settings.deployment_config
    base = _base(build)
    python = _python_of(base)
    modules, distributions = user_code(settings, folder, python)
    copies, downloads = _models(settings, folder)
    commands = build.extra_run_commands
    return ImagePlan(
        base=base,
        workdir=build.workdir,
        env=dict(build.env),
        requirements=tuple(sorted({*own_requirements(settings, python), *distributions})),
        downloads=tuple(downloads),
        secrets=tuple(deployment.secrets),
        run_commands=(commands,) if isinstance(commands, str) else tuple(commands),
        local_paths=(
            *own_package(),
            *modules,
            *config_paths(settings, environ, folder),
            *copies,
            *_mounts(deployment, build.workdir, folder),
        ),
    )


def build_image(plan: ImagePlan) -> modal.Image:
    """The image that was planned. Nothing is sent to Modal before the app is deployed or run."""
    image = modal.Image.from_registry(plan.base)
    for step in list(plan.steps())[1:]:
        (method, given), *others = step.items()
        options: dict[str, Any] = dict(others)
        if "secrets" in options:
            options["secrets"] = [modal.Secret.from_name(name) for name in options["secrets"]]
        image = getattr(image, method)(*(given if isinstance(given, list) else [given]), **options)
    return image


def image_in_container(settings: Settings) -> modal.Image:
    """The image as a container needs it, which runs in it already.

    Local files, the images' largest part, are not there to be looked at; Modal only compares how many objects a class
    depends on here and there, and an image is one, whatever its steps.
    """
    return modal.Image.from_registry(_base(settings.app_settings.build_config))


def _base(build: BuildConfig) -> str:
    names_version = ":" in build.image.rpartition("/")[2] or "@" in build.image
    return build.image if names_version or not build.tag else f"{build.image}:{build.tag}"


def _python_of(base: str) -> str:
    """The Python of an image: what the tag of an official one says, else taken to be that of this machine."""
    named = _OFFICIAL_PYTHON.search(base)
    return named[1] if named else "{}.{}".format(*sys.version_info)


def _mounts(deployment: DeploymentConfig, workdir: str, folder: Path) -> list[LocalPath]:
    paths = []
    for number, mount in enumerate(deployment.mounts):
        local = folder / Path(mount.local_path).expanduser()
        is_there, kind = (local.is_file(), "file") if mount.type == "file" else (local.is_dir(), "folder")
        if not is_there:
            raise LoadError(
                f"app_settings.deployment_config.mounts.{number}.local_path: there is no {kind} {local}; create it, "
                "correct the path, or set type (file or dir)"
            )
        remote = in_container(mount.remote_path, workdir)
        if mount.type == "file" and mount.remote_path.endswith("/"):
            remote = f"{remote}/{local.name}"
        paths.append(LocalPath(local, remote, is_folder=mount.type == "dir"))
    return paths


def _models(settings: Settings, folder: Path) -> tuple[list[LocalPath], list[str]]:
    """The folders to copy, and the shell commands that download, so that each `model_path` leads to the same model.

    Nothing for a model that is bundled, lies on a volume, a bucket or a mounted folder, or cannot be found here: it
    may be part of the base image. Nothing at all without `bake_models`.
    """
    if not settings.app_settings.build_config.bake_models:
        return [], []
    elsewhere, entries = _mounted(settings), settings.model_settings.model_entries.values()
    sources = dict.fromkeys(_source(entry, settings, folder, elsewhere) for entry in entries)  # each once
    copies = [source for source in sources if isinstance(source, LocalPath)]
    return copies, [source for source in sources if isinstance(source, str)]


def _source(entry: ModelEntry, settings: Settings, folder: Path, elsewhere: Iterable[str]) -> LocalPath | str | None:
    """The folder to copy, or the command that downloads."""
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
    loads_from_the_hub = _LOAD_FROM_THE_HUB.get(current_name(module, folder)) == name
    has_owner = "/" in path or revision is not None  # without, a folder is meant
    is_on_the_hub = loads_from_the_hub and has_owner and _HUB_NAME.fullmatch(path) is not None
    if not is_on_the_hub or _hub_cache_is_mounted(settings.app_settings.build_config.env, elsewhere):
        return None
    return shlex.join(["hf", "download", path, *([] if revision is None else ["--revision", str(revision)])])


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
