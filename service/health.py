"""Whether the batches of a worker can run, or its pipeline, or its process, has to be replaced."""

from typing import Any

from modalkit.batching import BatchRecord, BatchScheduler
from modalkit.service.errors import describe_error
from modalkit.service.pipeline_batches import is_device_fault

MAX_DEVICE_FAULTS = 2
"""Batches in a row that fail as a whole by a fault of the device with which a worker is broken. The text of one such
error may come from an item; a device that is lost fails every batch."""
MAX_STUCK_THREADS = 3
"""Threads stuck in batches that hang with which a worker is broken."""


class Health:
    """A sink for the batch records of one scheduler."""

    def __init__(self, scheduler: BatchScheduler[Any, Any]) -> None:
        self._scheduler = scheduler
        self._device_faults = 0
        self._device_fault = ""

    def __call__(self, record: BatchRecord) -> None:
        """Take a batch into account."""
        if record.device:
            return  # it ran in another process, which is started again where its device is lost
        if record.failed < record.count - record.requeued:
            self._device_faults = 0
        elif (fault := next(filter(is_device_fault, record.errors), None)) is not None:
            self._device_faults += 1
            self._device_fault = describe_error(fault)

    @property
    def device_is_lost(self) -> bool:
        """Whether the device is broken; each request asks for it."""
        return self._device_faults >= MAX_DEVICE_FAULTS

    @property
    def problem(self) -> str | None:
        """Why batches cannot be run any more: their device is broken, the scheduler, or too many hang; else None."""
        if self.device_is_lost:
            return f"its device is broken: {self._device_fault}"
        if self._scheduler.is_broken:
            return "its scheduler broke down, as the log says"
        if self.hangs:
            return f"{self._scheduler.stuck_threads} of its calls hang past batch_timeout_seconds"
        return None

    @property
    def hangs(self) -> bool:
        """Whether too many batches hang past their timeout: another pipeline, in threads of its own, may not."""
        return self._scheduler.stuck_threads >= MAX_STUCK_THREADS
