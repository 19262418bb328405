"""The service class with a method that tells of its batches."""

from collections import deque
from dataclasses import fields
from typing import Any

import modal
from pydantic_core import to_jsonable_python

from modalkit.batching import BatchRecord
from modalkit.service.on_modal.service import ModalService

KEPT_RECORDS = 10_000
_FIELDS = [field.name for field in fields(BatchRecord) if field.name != "errors"]


class MeasuredService(ModalService):
    """A `ModalService` that keeps the records of its latest batches.

    To measure a service class of your own, deploy ``class Measured(MeasuredService, YourService)``.
    """

    _records: "deque[dict[str, Any]] | None" = None

    def on_batch(self, record: BatchRecord) -> None:
        """Keep the record without its errors, which are no JSON, and pass it on."""
        if self._records is None:
            self._records = deque(maxlen=KEPT_RECORDS)
        self._records.append({name: getattr(record, name) for name in _FIELDS})
        super().on_batch(record)

    @modal.method()
    async def batch_report(self) -> dict[str, Any]:
        """The container's ``device``, its ``statistics`` and the ``records`` of its latest batches, then forgotten."""
        worker = self.running().worker
        records, self._records = self._records or (), None
        report: dict[str, Any] = to_jsonable_python(
            {"device": worker.pipeline.device_name(), "statistics": worker.statistics(), "records": list(records)}
        )
        return report
