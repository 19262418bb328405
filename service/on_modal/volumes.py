"""Brings what changed on a container's volumes into it, while it serves."""

import logging

import anyio
from anyio import to_thread

from modalkit.pipelines import InferencePipeline
from modalkit.service.on_modal.config import ModalConfig

logger = logging.getLogger(__name__)


async def keep_volumes_fresh(config: ModalConfig, pipeline: InferencePipeline, interval_s: float) -> None:
    """Every `interval_s` seconds, reload the volumes and tell the pipeline, in a thread beside the batches. Never ends.

    What fails is logged, and tried again the next time.
    """
    while True:
        await anyio.sleep(interval_s)
        try:
            if await to_thread.run_sync(config.reload_volumes):
                await to_thread.run_sync(pipeline.on_volume_reload)
        except Exception:
            logger.exception("The pipeline could not take up what is new on the volumes")
