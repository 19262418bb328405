"""What goes into the container's image, as plain data: made without Modal, shown by a dry run, and tested as it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE_FOLDER = "/root"
"""Where Modal's containers look for Python modules, whatever the working directory."""

NO_CACHES = ("**/__pycache__", "**/*.pyc", "**/.*")


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
