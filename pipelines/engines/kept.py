"""The cache folder: converted models and choices, by weights, device, packages and settings."""

import hashlib
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines.sameness import Same
from modalkit.pipelines.engines.settings import Candidate, EngineChoice, EngineSettings
from modalkit.pipelines.engines.torch_engine import changing_dimensions, device_of
from modalkit.pipelines.errors import EngineError
from modalkit.pipelines.files import replacing

logger = logging.getLogger(__name__)

PACKAGES = ("modalkit", "torch", "transformers", "openvino", "onnxruntime", "onnx", "onnxscript")


class Kept:
    """What is kept for one module on this device."""

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        settings: EngineSettings,
        same: Same | None,
        candidates: Sequence[Candidate],
    ) -> None:
        folder = settings.cache_folder or default_folder()
        versions = {name: _version(name) for name in PACKAGES}
        model = (_weights_hash(module), repr(module), str(getattr(module, "config", "")))
        inputs = sorted((name, str(batches[0][name].dtype), d) for name, d in changing_dimensions(batches).items())
        self._folder = folder / _hash(model, inputs)
        self._versions = versions
        situation = (processor(device_of(module)), cpu_threads().total, versions, [str(each) for each in candidates])
        asked = (settings.engine, settings.dtype, settings.sameness, getattr(same, "__qualname__", ""))
        self._choice = self._folder / f"choice-{_hash(situation, asked)}.json"

    def export_folder(self, engine: str) -> Path:
        """Where the module, converted for an engine by these versions, is or will be; it may not exist."""
        return self._folder / f"{engine}-{_hash(self._versions)}"

    def is_converted(self, engine: str) -> bool:
        """Whether the module is there, converted for an engine."""
        try:
            return self.export_folder(engine).is_dir()
        except OSError:  # not every folder may be looked into
            return False

    def choice(self) -> EngineChoice | None:
        """The earlier choice; None if there is none that can be read."""
        try:
            return EngineChoice.model_validate_json(self._choice.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("%s: no choice of an engine (%s): measuring again", self._choice, error)
            return None

    def keep(self, choice: EngineChoice) -> None:
        """Write a choice for later starts; without a place for it, they measure again."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._choice) as new:
                new.write_text(choice.model_dump_json(indent=1), encoding="utf-8")
        except OSError as error:
            logger.warning("%s: the choice of an engine cannot be kept (%s)", self._choice, error)


def default_folder() -> Path:
    """``modalkit/engines`` in the user's cache folder, which ``XDG_CACHE_HOME`` may name. Raises `EngineError`."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalkit" / "engines"
    except RuntimeError as error:
        raise EngineError(
            "this user has no home folder to keep engines in: set cache_folder (model_settings.common.engines)"
        ) from error


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with what it can compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {_cpu_name()} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return " ".join(line.split(":", 1)[1] for line in lines if line.startswith(("model name", "flags", "Features")))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:24]
