"""Bytes on their way from one task to another, with as little memory as wanted and no limit."""

import tempfile
from types import TracebackType
from typing import Self

import anyio

IN_MEMORY_BYTES = 2**20
CHUNK_BYTES = 2**16


class Spool:
    """A pipe that a writer never waits for: beyond a megabyte, what has not been read lies in a temporary file.

    For one reader, which waits. A context manager.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115  # closed by __exit__
        self._read_bytes = 0
        self._written_bytes = 0
        self._closed = False
        self._change = anyio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._file.seek(self._written_bytes)
        self._written_bytes += self._file.write(data)
        self._change.set()

    def close(self) -> None:
        """Let the reader come to an end once it has read everything."""
        self._closed = True
        self._change.set()

    async def read(self) -> bytes:
        """Up to `CHUNK_BYTES` of what comes next, once there is something; nothing at the end."""
        while self._read_bytes == self._written_bytes and not self._closed:
            self._change = anyio.Event()
            await self._change.wait()
        self._file.seek(self._read_bytes)
        data = self._file.read(CHUNK_BYTES)
        self._read_bytes += len(data)
        if self._read_bytes == self._written_bytes:
            self._read_bytes = self._written_bytes = 0
            self._file.seek(0)
            self._file.truncate()
        return data
