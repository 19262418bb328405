"""A worker that notices when its process can run no more batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from modalkit.batching import Failure, Outcome, Priority
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.errors import describe_error
from modalkit.service.on_modal.device_faults import is_device_fault
from modalkit.service.worker import InferenceWorker


class WatchedWorker(InferenceWorker):
    """Calls `on_fault` with the reason, once, whichever door brought the items that ran into it."""

    def __init__(self, *args: Any, on_fault: Callable[[str], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_fault = on_fault
        self._has_fault = False

    async def predict(
        self,
        item: BaseModel | Mapping[str, Any],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> InferenceOutputModel:
        """See `InferenceWorker.predict`."""
        try:
            return await super().predict(item, priority=priority, timeout_s=timeout_s)
        except Exception as error:
            self._look_at([error])
            raise

    async def predict_many(
        self,
        items: Sequence[BaseModel | Mapping[str, Any]],
        *,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> list[Outcome[InferenceOutputModel]]:
        """See `InferenceWorker.predict_many`."""
        try:
            outcomes = await super().predict_many(items, priority=priority, timeout_s=timeout_s)
        except Exception as error:
            self._look_at([error])
            raise
        self._look_at([outcome.error for outcome in outcomes if isinstance(outcome, Failure)])
        return outcomes

    @property
    def is_broken(self) -> bool:
        """Whether this process should be replaced."""
        return self._has_fault or super().is_broken

    def _look_at(self, errors: Sequence[Exception]) -> None:
        if self._has_fault:
            return
        fault = next((error for error in errors if is_device_fault(error)), None)
        if fault is not None:
            self._report(f"the device of this container is broken: {describe_error(fault)}")
        elif errors and super().is_broken:
            self._report("batches of this container hang, or cannot be run any more")

    def _report(self, fault: str) -> None:
        self._has_fault = True
        self._on_fault(fault)
