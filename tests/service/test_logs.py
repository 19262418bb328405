"""What log lines look like, and what they never hold."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars

from modalkit.service.logs import LogFormat, configure_logging

logger = logging.getLogger("some.module")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(monkeypatch: pytest.MonkeyPatch, log_format: LogFormat, stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging(log_format)
    return stream


def fail(secret: str) -> None:
    raise ValueError(f"{len(secret)} characters are too many")


def test_a_line_is_one_json_object_with_the_ids_that_are_bound_and_given(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch, LogFormat.AUTO)
    with bound_contextvars(request_id="r-1"):
        logger.warning("%d results for %r", 2, "a\nb", extra={"job_id": "j-1"})
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    assert list(found)[:4] == ["timestamp", "level", "logger", "event"]
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "level": "warning",
        "logger": "some.module",
        "event": "2 results for 'a\\nb'",
        "request_id": "r-1",
        "job_id": "j-1",
    }


def test_a_terminal_gets_readable_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch, LogFormat.AUTO, Terminal())
    with bound_contextvars(request_id="r-1"):
        logger.warning("something is wrong")
    said = stream.getvalue()
    assert "something is wrong" in said
    assert "r-1" in said
    assert not said.startswith("{")


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.TEXT])
def test_a_traceback_has_the_error_and_no_values_of_variables(
    monkeypatch: pytest.MonkeyPatch, log_format: LogFormat
) -> None:
    stream = written(monkeypatch, log_format)
    try:
        fail("a caller's text")
    except ValueError:
        logger.exception("It failed")
    said = stream.getvalue()
    assert "ValueError: 15 characters are too many" in said
    assert "in fail" in said
    assert "a caller's text" not in said.replace('fail("a caller\'s text")', "").replace(
        'fail(\\"a caller\'s text\\")', ""
    ), "only in the line of code"


def test_the_format_can_be_chosen_against_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch, LogFormat.JSON, Terminal())
    logger.warning("one")
    json.loads(stream.getvalue())
    stream = written(monkeypatch, LogFormat.TEXT)
    logger.warning("one")
    assert "\x1b" not in stream.getvalue(), "no colours outside a terminal"
    assert "one" in stream.getvalue()


def test_uvicorns_colours_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = written(monkeypatch, LogFormat.JSON)
    logger.warning("Started [%d]", 1, extra={"color_message": "Started [\x1b[36m%d\x1b[0m]"})
    assert json.loads(stream.getvalue()).keys() == {"timestamp", "level", "logger", "event"}
