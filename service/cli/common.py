"""Options and steps that several subcommands share."""

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from anyio.from_thread import start_blocking_portal
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from modalkit.service.loading import NO_MODELS, LoadError, ModelSource
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web.auth import configured_keys

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="A configuration file; may be repeated, later ones win."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Which of the configured models; the first if left out."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_LINES_FAILED = 4
"""The exit code of a command that has run all lines, some of which have errors. 3 is that of `modalkit serve`."""
EXIT_AWAY = 5
"""The exit code where the service cannot be reached: the same command may succeed later."""
SHOWN_ERRORS = 20
"""Errors of lines that a command prints; of more, it tells only the number."""
notices = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Messages for people, on standard error, as they are; standard output is for results."""


def one_of(kind: type[StrEnum]) -> dict[str, Any]:
    """Arguments of an option whose values are those of `kind`; typer's own message would begin with "Value error"."""

    def parse(text: str) -> StrEnum:
        try:
            return kind(text.lower())
        except ValueError:
            raise typer.BadParameter(f"must be one of {', '.join(kind)}, not {text!r}") from None

    return {"parser": parse, "metavar": "|".join(kind)}


def _number_option(kind: type[float], words: str, is_valid: Callable[[float], bool]) -> dict[str, Any]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value) or value == math.inf:
            raise typer.BadParameter(f"must be {words}, not {text}")
        return value

    return {"parser": parse, "metavar": "NUMBER"}


def whole(lowest: int, highest: int | None = None) -> dict[str, Any]:
    """Arguments of an option with a whole number from `lowest` to `highest`; typer's messages do not say the value."""
    to = "" if highest is None else f" to {highest}"
    limit = math.inf if highest is None else highest
    return _number_option(int, f"a whole number from {lowest}{to}", lambda value: lowest <= value <= limit)


POSITIVE = _number_option(float, "a number above 0", lambda value: value > 0)
"""Arguments of an option with a positive number."""
NOT_NEGATIVE = _number_option(float, "a number from 0", lambda value: value >= 0)
"""Arguments of an option with a number that may be 0."""


def progress_of_lines() -> Progress:
    """A bar for lines that run or are sent, with their rate; nothing where standard error is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=notices,
        transient=True,
        disable=not notices.is_terminal,
    )


def model_source(settings: Settings, model_name: str | None) -> ModelSource:
    """The model of that name, by default the first; raises `UnknownModelError` and `LoadError`."""
    entries = settings.model_settings.model_entries
    if not entries:
        raise LoadError(NO_MODELS)
    return ModelSource(settings, model_name or next(iter(entries)))


def try_api_keys(config: AuthConfig) -> None:
    """Read the configured API keys once, from AWS SSM where they are kept there. Raises `LoadError`."""
    keys = configured_keys(config)
    if config.uses_ssm:
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(keys.opened()):
            pass
