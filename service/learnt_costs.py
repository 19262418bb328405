"""What one pipeline's batches cost: read from a file or measured at start, and kept at the end."""

import logging

from anyio import CancelScope, to_thread
from pydantic import BaseModel

from batching import BatchScheduler, CostFeature, MeasuredCostModel
from batching.calibration import Calibration, Measurement
from pipelines import InferenceOutputModel, InferencePipeline
from service.cost_tables import CostKey, load_costs, save_costs
from service.settings import BatchConfig

logger = logging.getLogger(__name__)


class LearntCosts:
    """Owns the cost model of one pipeline; the scheduler corrects it by every batch."""

    def __init__(self, pipeline: InferencePipeline, batch_config: BatchConfig, *, calibrate: bool) -> None:
        self.model = MeasuredCostModel(CostFeature(pipeline.cost_feature))
        self._pipeline = pipeline
        self._batch_config = batch_config
        self._config = batch_config.calibration
        self._calibrate = calibrate and self._config.enabled

    async def learn(self, scheduler: BatchScheduler[BaseModel, InferenceOutputModel]) -> None:
        """Read the costs from the configured file, or measure them in the scheduler's thread.

        Whatever goes wrong is logged as a warning: real batches will teach the model all the same.
        """
        path = self._config.path
        if path is not None and await to_thread.run_sync(load_costs, path, CostKey.of(self._pipeline), self.model):
            return
        if self._calibrate:
            await self._measure(scheduler)
            await self.keep()

    async def keep(self) -> None:
        """Write the costs to the configured file, if any; not cut short by cancellation."""
        path = self._config.path
        if path is not None and self.model.observed:
            with CancelScope(shield=True):
                await to_thread.run_sync(save_costs, path, CostKey.of(self._pipeline), self.model)

    async def _measure(self, scheduler: BatchScheduler[BaseModel, InferenceOutputModel]) -> None:
        measured: list[Measurement] = []
        calibration = Calibration(
            run=self._pipeline.run_inference,
            sample_items=self._pipeline.sample_items,
            item_size=self._pipeline.item_size,
            max_count=self._batch_config.max_batch_size,
            max_tokens=self._batch_config.max_batch_tokens,
            max_s=self._config.max_seconds,
        )
        # No shape is begun that would end too late; that one takes longer than any batch may is not expected.
        limit_s = self._config.max_seconds + self._batch_config.batch_timeout_seconds
        try:
            await scheduler.run_in_thread(lambda: measured.extend(calibration.measure()), limit_s)
        except Exception as error:  # noqa: BLE001  # user code may raise anything, and real batches teach the model too
            logger.warning(
                "%s: measuring what batches cost ended early (%s: %s); the first real batches will tell",
                self._pipeline.model_name,
                type(error).__name__,
                error,
            )
        for shape in measured:
            self.model.calibrate(shape.count, shape.longest, shape.total, shape.seconds)
