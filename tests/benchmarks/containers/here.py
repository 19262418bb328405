"""The service class in this process, in place of its containers: tries a matrix without Modal and its price."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.server_side import Setup
from modalkit.benchmarks.containers.measured import MeasuredService
from modalkit.benchmarks.containers.variants import OpenTarget, Target, Variant
from modalkit.service.calls.engine import CallOptions
from modalkit.service.errors import RemoteCallError, describe_error
from modalkit.service.on_modal.config import ModalConfig


class TargetHere:
    """A service that runs in this process; a call of it fails as one that goes through Modal does."""

    def __init__(self, service: MeasuredService) -> None:
        self.client = self
        # Methods of an object that is not registered with Modal are plain ones, whatever their type says.
        self._process_request: Any = service.process_request
        self._batch_report: Any = service.batch_report

    async def call(self, model_name: str, entries: Sequence[Any], options: CallOptions) -> Sequence[Mapping[str, Any]]:
        """Run a call. Raises `RemoteCallError`."""
        try:
            outcomes: Sequence[Mapping[str, Any]] = await self._process_request(entries, **options.arguments())
        except Exception as error:
            raise RemoteCallError(f"the call failed: {describe_error(error)}") from error
        return outcomes

    async def report(self) -> tuple[str, Setup, Sequence[BatchRecord]]:
        """The report of the container."""
        report: tuple[str, Setup, Sequence[BatchRecord]] = await self._batch_report()
        return report


def opening_here(model_name: str | None, environ: Mapping[str, str] = os.environ) -> OpenTarget:
    """Starts a model of the configuration, by default its first, in this process, on whatever device it has."""

    @asynccontextmanager
    async def open_here(variant: Variant) -> AsyncIterator[Target]:
        service = MeasuredService()
        service.modal_utils = ModalConfig(environ=variant.environment(environ))
        service.model_name = model_name
        async with service:
            yield TargetHere(service)

    return open_here
