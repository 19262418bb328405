"""A body of any length becomes lines, whatever the pieces it comes in."""

from collections.abc import AsyncIterator

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from modalkit.batching import Failure
from modalkit.service.web.bodies import BodyParser
from modalkit.service.web.lines import Line, lines_of
from modalkit.service.web.problems import ProblemError
from tests.support.panic import Panic


async def lines_in(chunks: list[bytes], largest_bytes: int = 8) -> list[Line]:
    async def come() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return [line for lines in [found async for found in lines_of(come(), largest_bytes)] for line in lines]


def shown(lines: list[Line]) -> list[tuple[int, bytes | None]]:
    """Lines as they can be compared: without the reason why their content was dropped."""
    return [(line.number, line.content if isinstance(line.content, bytes) else None) for line in lines]


@pytest.mark.anyio
async def test_lines_are_numbered_and_empty_ones_left_out() -> None:
    assert await lines_in([b"a\n\n b\r\n", b"c"]) == [Line(1, b"a"), Line(3, b" b\r"), Line(4, b"c")]
    assert await lines_in([b"a\n"]) == [Line(1, b"a")]
    assert await lines_in([b"", b"\n \n"]) == []


@pytest.mark.anyio
async def test_a_line_that_is_too_large_is_dropped_alone_however_it_comes() -> None:
    assert shown(await lines_in([b"12345678\n123456789\nok"])) == [(1, b"12345678"), (2, None), (3, b"ok")]
    assert shown(await lines_in([b"1234", b"5678", b"9", b"0", b"\nok\n"])) == [(1, None), (2, b"ok")]
    assert shown(await lines_in([b"1234", b"56789"])) == [(1, None)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=6), st.data())
def test_the_pieces_make_no_difference(lines: list[bytes], data: st.DataObject) -> None:
    body = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert shown(anyio.run(lines_in, pieces)) == shown(anyio.run(lines_in, [body]))


class Odd(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def fail(cls, text: str) -> str:
        if text == "odd":
            raise LookupError("a validator's own error")
        if text == "panic":
            raise Panic("out of bounds")
        return text


@pytest.mark.anyio
async def test_each_line_has_its_own_error_whatever_it_is() -> None:
    """Lines that are JSON only together, as the second and the third, are none."""
    lines = [
        '{"text": "a"}',
        '{"a": [{"b": 1}',
        '{"c": 2}]}',
        '{"text": "b"},{"text": "c"}',
        '{"text": "odd"}',
        '{"text": "panic"}',
        "[1]",
    ]
    found = await BodyParser(Odd).item_lines([*(line.encode() for line in lines), b'{"text": "a", "text": "b"}'])
    assert found[0] == Odd(text="a")
    errors = [each.error for each in found[1:] if isinstance(each, Failure)]
    assert [type(error) for error in errors] == [*[ProblemError] * 3, LookupError, RuntimeError, *[ProblemError] * 2]
    assert "not JSON" in str(errors[0])
    assert "twice" in str(errors[-1])
