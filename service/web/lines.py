"""Cuts a body that is of any length into lines, while it comes."""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

LARGEST_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not empty. `number` counts all lines from 1; `content` is None where it is too large."""

    number: int
    content: bytes | None


async def lines_of(chunks: AsyncIterable[bytes], largest_bytes: int = LARGEST_LINE_BYTES) -> AsyncIterator[list[Line]]:
    """The lines of a body, those together that came together.

    Of one that is too large, nothing is kept, so that memory is bounded whatever is sent.
    """
    number, rest, too_large = 0, b"", False
    async for chunk in chunks:
        first, *others = chunk.split(b"\n")
        complete = []
        for ended in others:
            complete.append(None if too_large or len(rest) + len(first) > largest_bytes else rest + first)
            rest, too_large, first = b"", False, ended
        too_large = too_large or len(rest) + len(first) > largest_bytes
        rest = b"" if too_large else rest + first
        lines = [Line(number + count, content) for count, content in enumerate(complete, 1)]
        number += len(complete)
        if wanted := [line for line in lines if line.content is None or line.content.strip()]:
            yield wanted
    if too_large or rest.strip():
        yield [Line(number + 1, None if too_large else rest)]
