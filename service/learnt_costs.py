"""The batch costs of one pipeline: read from a file or measured at start, and written to the file at the end.

The file is JSON, with a table for each model and device.
"""

import fcntl
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyio import CancelScope, to_thread

from modalkit.batching import BatchScheduler, CostFeature, MeasuredCostModel
from modalkit.batching.calibration import Calibration, believed_measurements
from modalkit.batching.errors import users_error
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.pipelines.files import replacing
from modalkit.service.errors import describe_error
from modalkit.service.pipeline_batches import at_full_load, is_asynchronous_pipeline, is_too_large, max_in_flight_of
from modalkit.service.settings import BatchConfig

logger = logging.getLogger(__name__)

FILE_VERSION = 1


@dataclass(frozen=True, slots=True)
class CostKey:
    """What a cost table belongs to: a pipeline's class, a model with the arguments of its entry, and a device."""

    pipeline: str
    model: str
    device: str

    @classmethod
    def of(cls, pipeline: InferencePipeline, config: BatchConfig) -> "CostKey":
        """The key of a loaded pipeline that runs as `config` says."""
        max_in_flight = max_in_flight_of(pipeline, config)
        kind = type(pipeline)
        entry = json.dumps(pipeline.model_entry, sort_keys=True, default=str)  # may hold a token: only its hash is kept
        return cls(
            pipeline=f"{kind.__module__}:{kind.__qualname__}",
            model=f"{pipeline.model_name} {hashlib.sha256(entry.encode()).hexdigest()[:16]}",
            device=pipeline.device_name() + (f", {max_in_flight} batches at once" if max_in_flight > 1 else ""),
        )


class LearntCosts:
    """Owns the cost model of one pipeline; the scheduler corrects it by every batch.

    Raises `ValueError` for a pipeline whose `cost_feature` is unknown.
    """

    def __init__(self, pipeline: InferencePipeline, batch_config: BatchConfig, *, calibrate: bool) -> None:
        if pipeline.cost_feature not in set(CostFeature):
            raise ValueError(
                f"{type(pipeline).__name__}.cost_feature must be 'padded' or 'total', got {pipeline.cost_feature!r}"
            )
        self.model = MeasuredCostModel(CostFeature(pipeline.cost_feature))
        self._pipeline = pipeline
        self._batch_config = batch_config
        self._config = batch_config.calibration
        self._calibrate = calibrate and self._measures
        self._key: CostKey | None = None
        # Whether the costs are worth keeping: incomplete ones in the file would prevent a later measurement.
        self._is_complete = not self._measures

    @property
    def _measures(self) -> bool:
        # Costs of an asynchronous pipeline are those of a server elsewhere: only real batches teach them.
        return self._config.enabled and not is_asynchronous_pipeline(self._pipeline)

    async def learn(self, scheduler: BatchScheduler[Any, InferenceOutputModel], device: int = 0) -> None:
        """Read the costs from the configured file, or measure them in the scheduler's thread of that device.

        An equal device that was measured before has left them in the file. Errors are logged as warnings, because real
        batches teach the model too.
        """
        await self._load()
        if self._calibrate and not self._is_complete:
            await self._measure(scheduler, device)
            await self.keep()

    async def follow(self, pipeline: InferencePipeline, batch_config: BatchConfig) -> None:
        """Go on with the costs of another pipeline, which takes the place of this one, or within other limits.

        Its costs are those of the file, if it was measured before. Otherwise they stay as they are, and are not written
        to the file, so that the next start measures them.
        """
        if pipeline is not self._pipeline:
            self.model.expect_first_runs()
        await self.keep()
        self._pipeline, self._batch_config, self._config = pipeline, batch_config, batch_config.calibration
        self._key, self._is_complete = None, not self._measures
        await self._load()

    async def _load(self) -> None:
        """Read the costs of the pipeline from the configured file, if they are there."""
        if (path := self._config.path) is not None:
            try:
                self._key = CostKey.of(self._pipeline, self._batch_config)
            except BaseException as error:  # noqa: BLE001  # user code may raise anything, and no request depends on it
                self._warn("device_name failed, so its costs are not kept", users_error(error))
            else:
                self._is_complete |= await to_thread.run_sync(load_costs, path, self._key, self.model)

    async def keep(self) -> None:
        """Write the costs to the configured file, if any; cancellation does not interrupt it."""
        path, key = self._config.path, self._key
        if path is not None and key is not None and self._is_complete and self.model.observed:
            with CancelScope(shield=True):
                await to_thread.run_sync(save_costs, path, key, self.model)

    async def _measure(self, scheduler: BatchScheduler[Any, InferenceOutputModel], device: int) -> None:
        calibration = Calibration(
            run=at_full_load(self._pipeline, max_in_flight_of(self._pipeline, self._batch_config)),
            sample_items=self._pipeline.sample_items,
            item_size=self._pipeline.item_size,
            max_count=self._batch_config.max_batch_size,
            max_tokens=self._batch_config.max_batch_tokens,
            max_s=self._config.max_seconds,
            is_too_large=is_too_large,
        )
        # No shape starts that would end too late, and none should take longer than a batch may.
        limit_s = self._config.max_seconds + self._batch_config.batch_timeout_seconds
        try:
            await scheduler.run_in_thread(lambda: list(calibration.measure()), limit_s, device=device)
        except Exception as error:  # noqa: BLE001  # user code may raise anything, and real batches teach the model too
            self._warn("measuring batch costs ended early; the first real batches teach them", error)
        else:
            # Shapes without time now have none at the next start either; those that failed may run then.
            self._is_complete = calibration.failure is None
        if (failure := calibration.failure) is not None:
            self._warn(
                f"the costs of items of size {failure.size} and more are not known, because one failed", failure.error
            )
        for shape in believed_measurements(calibration.measurements):
            if shape.seconds > 0:
                self.model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)

    def _warn(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s (%s)", self._pipeline.model_name, what, describe_error(error))


def load_costs(path: Path, key: CostKey, model: MeasuredCostModel) -> bool:
    """Load the costs for `key` from the file at `path` into `model`; returns whether there are any.

    A file or a table that cannot be read, or a table of another device, causes a warning and is not used.
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
    others = [table["key"].get("device") for table in tables if {**table["key"], "device": key.device} == asdict(key)]
    if others:
        found = f"on another device ({', '.join(map(str, others))}; this is {key.device})"
        logger.warning("%s: the costs of %s were measured %s: measuring again", path, key.model, found)
    return False


def save_costs(path: Path, key: CostKey, model: MeasuredCostModel) -> None:
    """Write the costs of `key` into the file, beside those of other keys; an error is logged, not raised.

    Several threads and processes may do so concurrently; readers see the old file or the new one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tables = [table for table in _read(path) if table["key"] != asdict(key)]
            tables.append({"key": asdict(key), "costs": model.state()})
            with replacing(path) as new:
                new.write_text(json.dumps({"version": FILE_VERSION, "tables": tables}, indent=1), encoding="utf-8")
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
