"""The service class with a method that tells of its batches."""

from collections import deque
from dataclasses import replace

import modal

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.server_side import Setup
from modalkit.service.on_modal.service import ModalService

KEPT_RECORDS = 10_000


class MeasuredService(ModalService):
    """A `ModalService` that keeps the records of its latest batches.

    To measure a service class of your own, deploy ``class Measured(MeasuredService, YourService)``.
    """

    _records: "deque[BatchRecord] | None" = None

    def on_batch(self, record: BatchRecord) -> None:
        """Keep what the report needs of the record, and pass it on."""
        if self._records is None:
            self._records = deque(maxlen=KEPT_RECORDS)
        self._records.append(replace(record, errors=(), sizes=(), tags=()))
        super().on_batch(record)

    @modal.method()
    async def batch_report(self) -> tuple[str, Setup, list[BatchRecord]]:
        """The container's device, what runs batches, and the records of its latest ones, which are then forgotten."""
        records, self._records = self._records or (), None
        worker = self.running().worker
        return worker.pipeline.device_name(), Setup.of(worker), list(records)
