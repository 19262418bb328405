"""The container's image: planned from the settings, then built of Modal's steps in the order that Modal demands."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import modal

from modalkit.service.loading import LoadError
from modalkit.service.on_modal.image_code import own_package, own_requirements, user_code
from modalkit.service.on_modal.image_plan import ImagePlan, LocalPath, in_container, models
from modalkit.service.settings import BuildConfig, DeploymentConfig, Settings
from modalkit.service.settings.layers import CONFIG_VARIABLE, DEFAULT_FILE

_OFFICIAL_PYTHON = re.compile(r"(?:^|/)python:(\d+\.\d+)")


def config_paths(settings: Settings, environ: Mapping[str, str], folder: Path) -> tuple[LocalPath, ...]:
    """The files of the configuration, each with its place in the container, later ones over earlier ones.

    They are those named in `MODALKIT_CONFIG`, else the working folder's modalkit.yaml if there is one.
    """
    names = [name.strip() for name in environ.get(CONFIG_VARIABLE, "").split(",") if name.strip()]
    if not names and (folder / DEFAULT_FILE).is_file():
        names = [str(DEFAULT_FILE)]
    start = settings.app_settings.build_config.workdir
    files = [folder / Path(name).expanduser() for name in names]
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
    code = user_code(settings, folder, python)
    copies, downloads = models(settings, folder)
    commands = build.extra_run_commands
    return ImagePlan(
        base=base,
        workdir=build.workdir,
        env=dict(build.env),
        requirements=tuple(sorted({*own_requirements(settings, python), *code.requirements})),
        downloads=tuple(shlex.join(download.command()) for download in downloads),
        secrets=tuple(deployment.secrets),
        run_commands=(commands,) if isinstance(commands, str) else tuple(commands),
        local_paths=(
            *own_package(),
            *code.local_paths,
            *_existing(config_paths(settings, environ, folder)),
            *copies,
            *_mounts(deployment, build.workdir, folder),
        ),
    )


def build_image(plan: ImagePlan) -> modal.Image:
    """The image that was planned. Nothing is sent to Modal before the app is deployed or run."""
    image = modal.Image.from_registry(plan.base).workdir(plan.workdir)
    if plan.env:
        image = image.env(dict(plan.env))
    image = image.uv_pip_install(*plan.requirements)
    # Before the user's commands, whose every change would download the models anew.
    image = image.run_commands(*plan.downloads, secrets=[modal.Secret.from_name(name) for name in plan.secrets])
    image = image.run_commands(*plan.run_commands)
    for path in plan.local_paths:
        if path.is_folder:
            image = image.add_local_dir(path.local, path.remote, ignore=path.ignore)
        else:
            image = image.add_local_file(path.local, path.remote)
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


def _existing(files: Sequence[LocalPath]) -> Sequence[LocalPath]:
    for file in files:
        if not file.local.is_file():
            raise LoadError(f"{CONFIG_VARIABLE}: there is no file {file.local}; create it or correct its name")
    return files


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
