"""Jobs as text for people."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import to_json
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modalkit.service.jobs import DeliveryStatus
from modalkit.service.web.answers import JobView

ID_WIDTH = 36
OTHER_COLUMNS_WIDTH = 68  # columns of a line for id, states and age, gaps included
MIN_MODEL_WIDTH = 12
UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}

_URL = re.compile(r"(\w+://)(?:[^\s/?#'\"]*@)?([^\s/?#'\"]+)([^\s'\"]*)")


def job_table(jobs: Sequence[JobView], width: int) -> Table:
    """A table of jobs for terminals of 80 columns or more. A job with an error takes two lines."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("job", min_width=ID_WIDTH)
    table.add_column("status", no_wrap=True)
    table.add_column("delivery", no_wrap=True)
    table.add_column("model", max_width=max(MIN_MODEL_WIDTH, width - OTHER_COLUMNS_WIDTH))
    table.add_column("age", no_wrap=True, justify="right")
    now = datetime.now(UTC)
    for job in jobs:
        undelivered = job.delivery is DeliveryStatus.UNDELIVERED
        error = (undelivered and job.delivery_error) or job.error or job.delivery_error
        lines = [Text(job.job_id, overflow="fold")]
        if error:
            lines.append(Text(f"  {_without_secrets(_one_line(error))}", "dim", no_wrap=True, overflow="ellipsis"))
        model = Text(_one_line(job.model_name), no_wrap=True, overflow="ellipsis")
        table.add_row(Group(*lines), job.status, job.delivery, model, _age(now - job.created_at))
    return table


def job_text(job: JobView) -> str:
    """All fields of a job, one a line; JSON is indented over several lines."""
    fields = {name: getattr(job, name) for name in type(job).model_fields}
    width = max(map(len, fields)) + 2
    return "\n".join(f"{name:<{width}}{_value_text(value, width)}" for name, value in fields.items())


def seconds_of(duration: str) -> int | None:
    """The seconds of a duration such as 90s, 15m, 2h or 7d; None for any other text."""
    parts = re.fullmatch(r"(\d{1,9})([smhd])", duration, re.ASCII)
    return None if parts is None else int(parts[1]) * UNITS_S[parts[2]]


def duration_text(seconds: int) -> str:
    """The shortest text of which `seconds_of` returns `seconds`."""
    unit, unit_s = next(item for item in UNITS_S.items() if seconds % item[1] == 0)
    return f"{seconds // unit_s}{unit}"


def _value_text(value: Any, indentation: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        value = to_json(value, indent=2).decode().replace("\n", "\n" + " " * indentation)
    return "\n".join(_printable(line) for line in str(value).splitlines())


def _age(elapsed: timedelta) -> str:
    """The time in its largest whole unit; 0s where this machine's clock is behind that of the service."""
    seconds = max(0, int(elapsed.total_seconds()))
    unit, unit_s = next((item for item in UNITS_S.items() if seconds >= item[1]), ("s", 1))
    return f"{seconds // unit_s}{unit}"


def _one_line(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """The text without control characters, which a caller may have sent and an error may quote."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _without_secrets(text: str) -> str:
    """The text with each URL cut to scheme and host: URLs of webhooks may hold secrets."""
    return _URL.sub(lambda url: url[1] + url[2] + ("/…" if url[3] else ""), text)
