"""Keeps measured batch costs between starts: a JSON file with a table for each model and device."""

import fcntl
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modalkit.batching import MeasuredCostModel
from modalkit.pipelines import InferencePipeline

logger = logging.getLogger(__name__)

FILE_VERSION = 1


@dataclass(frozen=True, slots=True)
class CostKey:
    """What a cost table belongs to: a pipeline's class, a model with the arguments of its entry, and a device."""

    pipeline: str
    model: str
    device: str

    @classmethod
    def of(cls, pipeline: InferencePipeline) -> "CostKey":
        """The key of a loaded pipeline."""
        kind = type(pipeline)
        entry = json.dumps(pipeline.model_entry, sort_keys=True, default=str)  # may hold a token: only its hash is kept
        return cls(
            pipeline=f"{kind.__module__}:{kind.__qualname__}",
            model=f"{pipeline.model_name} {hashlib.sha256(entry.encode()).hexdigest()[:16]}",
            device=pipeline.device_name(),
        )


def load_costs(path: Path, key: CostKey, model: MeasuredCostModel) -> bool:
    """Load the costs for `key` from the file at `path` into `model`; returns whether there are any.

    A file that cannot be read, or a table of another device, causes a warning and is not used.
    """
    tables = _read(path)
    for table in tables:
        if table["key"] == asdict(key):
            try:
                model.restore(table["costs"])
            except (KeyError, ValueError) as error:
                logger.warning("%s: the costs of %s are damaged (%s): measuring again", path, key.model, error)
                return False
            return True
    others = [
        str(table["key"].get("device")) for table in tables if {**table["key"], "device": key.device} == asdict(key)
    ]
    if others:
        logger.warning(
            "%s: the costs of %s were measured on another device (%s; this is %s): measuring again",
            path,
            key.model,
            ", ".join(others),
            key.device,
        )
    return False


def save_costs(path: Path, key: CostKey, model: MeasuredCostModel) -> None:
    """Write the costs of `key` into the file, beside those of other keys; an error is logged, not raised.

    Several threads and processes may do so concurrently; readers see the old file or the new one.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tables = [table for table in _read(path) if table["key"] != asdict(key)]
            tables.append({"key": asdict(key), "costs": model.state()})
            try:
                partial.write_text(json.dumps({"version": FILE_VERSION, "tables": tables}, indent=1), encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: batch costs cannot be kept (%s); the next start measures them again", path, error)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FILE_VERSION:
            raise ValueError(f"version {content['version']!r} is not {FILE_VERSION}")  # noqa: TRY301  # one warning for all
        return [table for table in content["tables"] if isinstance(table, dict) and isinstance(table.get("key"), dict)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: no file of batch costs (%s: %s): measuring again", path, type(error).__name__, error)
        return []
