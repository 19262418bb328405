"""The ledger's table on Modal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import modal

from service.errors import describe_error
from service.jobs import JobStoreError
from service.on_modal.config import ModalConfig
from service.on_modal.ledger import CallLedger


class ModalTable:
    """A `modal.Dict`, which forgets what nobody has read or written for seven days, as Modal does with results.

    Raises `JobStoreError` when it cannot be reached.
    """

    def __init__(self, name: str) -> None:
        self._dict = modal.Dict.from_name(name, create_if_missing=True)

    async def get(self, key: str) -> Any:
        """See `Table.get`."""
        with _reached():
            return await self._dict.get.aio(key)

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """See `Table.put`."""
        with _reached():
            return await self._dict.put.aio(key, value, skip_if_exists=skip_if_exists)

    async def remove(self, key: str) -> None:
        """See `Table.remove`."""
        with _reached():
            await self._dict.pop.aio(key, None)


def open_ledger(config: ModalConfig) -> CallLedger:
    """The ledger that all containers of an app share."""
    return CallLedger(ModalTable(f"{config.app_name}-jobs"))


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise JobStoreError(f"the app's modal.Dict of jobs could not be reached: {describe_error(error)}") from error
