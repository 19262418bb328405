"""The service class with a method that tells of its batches."""

from collections import deque
from dataclasses import fields, replace
from typing import Any

import modal
from pydantic_core import to_jsonable_python

from modalkit.batching import BatchRecord
from modalkit.service.on_modal.service import ModalService

KEPT_RECORDS = 10_000
_LEFT_OUT = ("errors", "sizes", "tags", "waits_s")
_FIELDS = ["queue_s", *(field.name for field in fields(BatchRecord) if field.name not in _LEFT_OUT)]


def plain_record(record: BatchRecord) -> dict[str, Any]:
    """What a report has of a batch: plain values, one for the whole batch each."""
    return {name: getattr(record, name) for name in _FIELDS}


class MeasuredService(ModalService):
    """A `ModalService` that keeps the records of its latest batches.

    To measure a service class of your own, deploy ``class Measured(MeasuredService, YourService)``.
    """

    _records: "deque[dict[str, Any]] | None" = None

    def on_batch(self, record: BatchRecord) -> None:
        """Keep what the report needs of the record, and pass it on."""
        if self._records is None:
            self._records = deque(maxlen=KEPT_RECORDS)
        self._records.append(plain_record(record))
        super().on_batch(record)

    @modal.method()
    async def batch_report(self) -> dict[str, Any]:
        """The container's ``device``, its ``statistics`` and the ``records`` of its latest batches, then forgotten."""
        worker = self.running().worker
        records, self._records = self._records or (), None
        statistics = replace(worker.statistics(), recent=())
        report: dict[str, Any] = to_jsonable_python(
            {"device": worker.pipeline.device_name(), "statistics": statistics, "records": list(records)}
        )
        return report
