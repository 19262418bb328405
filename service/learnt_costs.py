"""The batch costs of one pipeline: read from a file or measured at start, and written to the file at the end."""

import logging

from anyio import CancelScope, to_thread
from pydantic import BaseModel

from modalkit.batching import BatchScheduler, CostFeature, MeasuredCostModel
from modalkit.batching.calibration import Calibration, Measurement, undisturbed
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.cost_tables import CostKey, load_costs, save_costs
from modalkit.service.errors import describe_error
from modalkit.service.pipeline_batches import is_too_large
from modalkit.service.settings import BatchConfig

logger = logging.getLogger(__name__)


class LearntCosts:
    """Owns the cost model of one pipeline; the scheduler corrects it by every batch.

    Raises `ValueError` for a pipeline whose `cost_feature` is none.
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
        self._calibrate = calibrate and self._config.enabled
        self._key: CostKey | None = None
        # Whether the costs are worth keeping: incomplete ones in the file would prevent a later measurement.
        self._is_complete = not self._config.enabled

    async def learn(self, scheduler: BatchScheduler[BaseModel, InferenceOutputModel]) -> None:
        """Read the costs from the configured file, or measure them in the scheduler's thread.

        Errors are logged as warnings, because real batches teach the model too.
        """
        path = self._config.path
        if path is not None:
            self._key = self._make_key()
        if path is not None and self._key is not None:
            self._is_complete |= await to_thread.run_sync(load_costs, path, self._key, self.model)
        if self._calibrate and not self._is_complete:
            await self._measure(scheduler)
            await self.keep()

    async def keep(self) -> None:
        """Write the costs to the configured file, if any; cancellation does not interrupt it."""
        path, key = self._config.path, self._key
        if path is not None and key is not None and self._is_complete and self.model.observed:
            with CancelScope(shield=True):
                await to_thread.run_sync(save_costs, path, key, self.model)

    def _make_key(self) -> CostKey | None:
        try:
            return CostKey.of(self._pipeline)
        except Exception as error:  # noqa: BLE001  # user code may raise anything, and no request depends on it
            self._warn("device_name failed, so its costs are not kept", error)
            return None

    async def _measure(self, scheduler: BatchScheduler[BaseModel, InferenceOutputModel]) -> None:
        measured: list[Measurement] = []
        calibration = Calibration(
            run=self._pipeline.run_inference,
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
            await scheduler.run_in_thread(lambda: measured.extend(calibration.measure()), limit_s)
        except Exception as error:  # noqa: BLE001  # user code may raise anything, and real batches teach the model too
            self._warn("measuring batch costs ended early; the first real batches teach them", error)
        else:
            # Shapes without time now have none at the next start either; those that failed may run then.
            self._is_complete = calibration.failure is None
        if (failure := calibration.failure) is not None:
            self._warn(
                f"the costs of items of size {failure.size} and more are not known, because one failed", failure.error
            )
        for shape in undisturbed(measured):
            if shape.seconds > 0:
                self.model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)

    def _warn(self, what: str, error: Exception) -> None:
        logger.warning("%s: %s (%s)", self._pipeline.model_name, what, describe_error(error))
