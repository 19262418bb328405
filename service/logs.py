"""How log lines are written: as JSON for programs, or readable for a person at a terminal.

Modules log by `logging`, and a program that has its own handlers keeps them. Each line has the ids that are bound
where it is logged (`structlog.contextvars`), such as ``request_id``, and those given as ``extra``, such as ``job_id``.
"""

import logging
import sys
from enum import StrEnum

import structlog
from structlog.processors import JSONRenderer, TimeStamper
from structlog.typing import EventDict, Processor, WrappedLogger


class LogFormat(StrEnum):
    """How log lines are written."""

    AUTO = "auto"
    """As text to a terminal, as JSON to anything else."""
    JSON = "json"
    TEXT = "text"


class LogLevel(StrEnum):
    """What is logged: lines of this level and above."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure_logging(log_format: LogFormat) -> None:
    """Write what is logged to standard error; replaces the handlers of the root logger."""
    is_terminal = sys.stderr.isatty()
    is_json = log_format is LogFormat.JSON or (log_format is LogFormat.AUTO and not is_terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        TimeStamper("iso", utc=is_json),
        _without_colors,
    ]
    # Tracebacks are plain in both: structlog's own would show the values of variables, which may be callers' texts.
    renderers: list[Processor]
    if is_json:
        renderers = [structlog.processors.format_exc_info, _in_one_order, JSONRenderer(sort_keys=False)]
    else:
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=plain, pad_event_to=0)]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(handlers=[handler], force=True)


def _without_colors(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Uvicorn gives its lines twice, the second time with colours."""
    event.pop("color_message", None)
    return event


def _in_one_order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """What every line has comes first."""
    first = {name: event.pop(name) for name in ("timestamp", "level", "logger", "event")}
    return {**first, **event}
