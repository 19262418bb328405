"""The Python code that a container needs: modalkit itself, what it depends on, and the user's own modules."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import modalkit
from modalkit.pipelines.extras import install_command
from modalkit.service.loading import LoadError, current_name, find_top_module
from modalkit.service.settings import Settings

SOURCE_FOLDER = "/root"
"""Where Modal's containers look for Python modules, whatever the working directory."""

_CONTAINER = {"os_name": "posix", "platform_machine": "x86_64", "platform_system": "Linux", "sys_platform": "linux"}
_NO_CACHES = ("**/__pycache__", "**/*.pyc", "**/.*")
_RESULTS = ("**/*.png", "**/results")


@dataclass(frozen=True)
class LocalPath:
    """A local file or folder and its absolute place in the container; of a folder, what matches `ignore` stays out."""

    local: Path
    remote: str
    is_folder: bool
    ignore: tuple[str, ...] = ()


def own_package() -> tuple[LocalPath, ...]:
    """The package `modalkit` with its data, from where it is installed or from a checkout.

    In a checkout most of its folders are links, and what Modal copies ends at links: each is a path of its own.
    """
    home = Path(modalkit.__file__).resolve().parent
    links = sorted(path for path in home.iterdir() if path.is_symlink() and path.is_dir())
    remote, ignore = f"{SOURCE_FOLDER}/modalkit", _NO_CACHES + _RESULTS
    return (
        LocalPath(home, remote, is_folder=True, ignore=ignore),
        *(LocalPath(link.resolve(), f"{remote}/{link.name}", is_folder=True, ignore=ignore) for link in links),
    )


def own_requirements(settings: Settings, python: str) -> tuple[str, ...]:
    """What modalkit needs to run as configured, at the versions installed here.

    What is not installed, or not in a version for the container's `python` (as in ``3.11``), stays a range. Raises
    `LoadError` where the installed modalkit does not say what it needs.
    """
    try:
        distribution = metadata.distribution("modalkit")
    except metadata.PackageNotFoundError as error:
        raise LoadError(
            "the image needs what modalkit depends on, and modalkit is not installed here: run pip install -e . in "
            "its folder"
        ) from error
    app = settings.app_settings
    backends = {app.queue_config.backend, *app.queue_config.routes.values()}
    extras = {"taskiq"} & backends
    if "sqs" in backends or app.auth_config.uses_ssm:
        extras.add("aws")
    known = distribution.metadata.get_all("Provides-Extra") or []
    if missing := extras - set(known):
        raise LoadError(
            f"the configuration needs what the extra {', '.join(sorted(missing))} installs, which the installed "
            f"modalkit {distribution.version} does not know: {install_command(','.join(sorted(missing)))}"
        )
    # Modal gives its client to every container.
    lines = (line for line in distribution.requires or [] if Requirement(line).name != "modal")
    return pinned(lines, extras, python)


def pinned(lines: Iterable[str], extras: Iterable[str], python: str) -> tuple[str, ...]:
    """Of these requirements the ones that hold in the container with these extras, at the versions installed here."""
    versions = {"python_version": python, "python_full_version": _latest(python)}
    environments = [_CONTAINER | versions | {"extra": extra} for extra in ("", *sorted(extras))]
    requirements = set()
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            requirement.marker = None
            requirements.add(_pin(requirement, python))
    return tuple(sorted(requirements))


def _pin(requirement: Requirement, python: str) -> str:
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return str(requirement)
    supported = SpecifierSet(",".join(distribution.metadata.get_all("Requires-Python") or ()))
    if not supported.contains(_latest(python)):
        return str(requirement)  # the newest numpy, say, has no build for the Python of an older image
    version = Version(distribution.version)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    # A local part, as in 2.13.0+cpu, names a build for this machine that the package index does not have.
    return f"{requirement.name}{extras}=={version.public}"


def _latest(python: str) -> str:
    return f"{python}.99"  # whatever its third number is, a lower bound such as >=3.11.2 is met by a maintained image


def user_code(settings: Settings, folder: Path, python: str) -> tuple[list[LocalPath], set[str]]:
    """The modules that the configuration names, and those of the working `folder` that are imported already.

    They are the files to copy, and the requirements that others of them were installed from. Nothing is imported for
    it. Raises `LoadError` for a module that does not exist.
    """
    paths: dict[str, list[LocalPath]] = {}
    requirements: set[str] = set()
    for name, key in _named(settings, folder).items():
        files = _locate(name, key, folder)
        distributions = metadata.packages_distributions().get(name, []) if _are_installed(files) else []
        if distributions:
            requirements.update(_pin(Requirement(distribution), python) for distribution in distributions)
        else:
            paths[name] = _to_source_folder(name, files)
    for name, files in _imported(folder):
        if name not in paths:
            paths[name] = _to_source_folder(name, files)
    return [path for name in sorted(paths) for path in paths[name]], requirements


def _named(settings: Settings, folder: Path) -> Mapping[str, str]:
    """The top-level names of the modules that the configuration names, each with the first key that does."""
    queue = settings.app_settings.queue_config
    at: dict[str, str | None] = {
        f"model_settings.model_entries.{model}.{field}": getattr(entry, field)
        for model, entry in settings.model_settings.model_entries.items()
        for field in ("pipeline", "input_model", "output_model")
    }
    at["app_settings.queue_config.backend"] = queue.backend
    at |= {f"app_settings.queue_config.routes.{pattern}": backend for pattern, backend in queue.routes.items()}
    names: dict[str, str] = {}
    for key, path in at.items():
        if path is not None and ":" in path:
            names.setdefault(_top_name(path.partition(":")[0], folder), key)
    for index, module in enumerate(settings.app_settings.build_config.python_modules):
        names.setdefault(_top_name(module, folder), f"app_settings.build_config.python_modules.{index}")
    return {name: key for name, key in names.items() if not _is_given(name)}


def _top_name(module: str, folder: Path) -> str:
    return current_name(module, folder).partition(".")[0]


def _is_given(name: str) -> bool:
    """Whether a container has the module in any case."""
    return name == "modalkit" or name in sys.stdlib_module_names


def _locate(name: str, key: str, folder: Path) -> list[Path]:
    """The file or the folders of a top-level module."""
    spec = find_top_module(name, folder)
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin or ""]
    files = [Path(place) for place in places if place and Path(place).exists()]
    if not files:
        raise LoadError(
            f"{key}: there is no module {name!r}; check the spelling, or start from the folder that holds it"
        )
    return files


def _imported(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    for name, module in list(sys.modules.items()):
        if "." in name or _is_given(name):
            continue
        paths = list(getattr(module, "__path__", None) or [getattr(module, "__file__", None) or ""])
        files = [Path(path).resolve() for path in paths if path]
        # A file under another name (__main__, what a test runner makes up) cannot be imported by it in the container.
        if files and all(file.stem == name and _is_local(file, folder) for file in files):
            yield name, files


def _is_local(file: Path, folder: Path) -> bool:
    home = folder.resolve()
    if not file.is_relative_to(home) or _are_installed([file]):
        return False
    environments = (parent for parent in file.parents if parent.is_relative_to(home))
    return not any((parent / "pyvenv.cfg").exists() for parent in environments)


def _are_installed(files: Iterable[Path]) -> bool:
    return any({"site-packages", "dist-packages"} & set(file.parts) for file in files)


def _to_source_folder(name: str, files: Iterable[Path]) -> list[LocalPath]:
    return [
        LocalPath(file, f"{SOURCE_FOLDER}/{name}", is_folder=True, ignore=_NO_CACHES)
        if file.is_dir()
        else LocalPath(file, f"{SOURCE_FOLDER}/{file.name}", is_folder=False)
        for file in files
    ]
