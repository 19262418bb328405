"""An environment for each peer: what it needs beside modalkit's own packages, at exact versions."""

import hashlib
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

ENVIRONMENTS = Path(".cache/peers")
REQUIREMENTS = Path(__file__).parent / "requirements"


class BuildError(Exception):
    """Raised when an environment cannot be built; the message has pip's last lines."""


def environment_names() -> list[str]:
    """The peers that have requirements of their own."""
    return sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


def python_of(name: str) -> Path:
    """The interpreter of a peer; that of this process for one without requirements."""
    return _folder(name) / "bin" / "python" if name in environment_names() else Path(sys.executable)


def build(name: str, show: Callable[[str], None]) -> None:
    """Build the environment of a peer, unless it is built already. Raises `BuildError`.

    Packages that are not in its requirements come from the environment of this process: torch is installed once, and is
    the same for all.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.prefix.encode()).hexdigest()
    stamp = _folder(name) / "installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return
    show(f"{name}: installing into {_folder(name)}")
    venv.create(_folder(name), clear=True, symlinks=True)
    shared = sysconfig.get_path("purelib")
    (_packages(name) / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
    # pip complains of what the environment of this process would need, so its output is shown only where it fails.
    command = [str(python_of(name)), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{name}: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    stamp.write_text(digest, encoding="utf-8")


def versions_of(name: str) -> dict[str, str]:
    """The packages of a peer's own environment."""
    if name not in environment_names():
        return {}
    return {found.name: found.version for found in distributions(path=[str(_packages(name))])}


def _folder(name: str) -> Path:
    return ENVIRONMENTS.absolute() / name


def _packages(name: str) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return _folder(name) / "lib" / version / "site-packages"
