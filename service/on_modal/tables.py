"""The ledger's table on Modal."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import modal
import modal.exception
from grpclib.exceptions import StreamTerminatedError

from modalkit.service.errors import describe_error
from modalkit.service.jobs import JobStoreError
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.ledger import CallLedger

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long to ask again where Modal is out of reach: by a container, whose call would fail with all of its jobs."""
RETRY_S = 1.0

_OUT_OF_REACH = (
    modal.exception.ConnectionError,
    modal.exception.InternalError,
    modal.exception.ServiceError,
    StreamTerminatedError,
)


class ModalTable:
    """A `modal.Dict`, which forgets what nobody has read or written for seven days, as Modal does with results.

    Raises `JobStoreError` when it cannot be reached for `PATIENCE_S` seconds, or refuses.
    """

    def __init__(self, name: str) -> None:
        self._dict = modal.Dict.from_name(name, create_if_missing=True)

    async def get(self, key: str) -> Any:
        """See `Table.get`."""
        return await _reach(lambda: self._dict.get.aio(key))

    async def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool:
        """See `Table.put`."""
        return await _reach(lambda: self._dict.put.aio(key, value, skip_if_exists=skip_if_exists))

    async def remove(self, key: str) -> None:
        """See `Table.remove`."""
        await _reach(lambda: self._dict.pop.aio(key, None))


def open_ledger(config: ModalConfig) -> CallLedger:
    """The ledger that all containers of an app share."""
    return CallLedger(ModalTable(f"{config.app_name}-jobs"))


async def _reach(ask: Callable[[], Awaitable[T]]) -> T:
    patient_until_s = anyio.current_time() + PATIENCE_S
    while True:
        try:
            return await ask()
        except Exception as error:
            problem = f"the app's modal.Dict of jobs could not be reached: {describe_error(error)}"
            if not isinstance(error, _OUT_OF_REACH) or anyio.current_time() >= patient_until_s:
                raise JobStoreError(problem) from error
        logger.warning("%s; trying again", problem)
        await anyio.sleep(RETRY_S)
