"""Options and steps that several subcommands share."""

from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console

from modalkit.service.cli.records import FileFormat
from modalkit.service.loading import ModelSource
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web.auth import ApiKey, require_api_key

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="A configuration file; may be repeated, later ones win."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Which of the configured models; the first if left out."),
]
FormatOption = Annotated[
    FileFormat | None,
    typer.Option("--format", "-f", help="The input's format, where its name does not tell."),
]
ColumnOption = Annotated[str | None, typer.Option(help="The CSV column, or JSON key, that holds the text.")]

notices = Console(stderr=True, soft_wrap=True, highlight=False)
"""Messages for people, on standard error; standard output is for results."""


def model_source(settings: Settings, model_name: str | None) -> ModelSource:
    """The model of that name, by default the first; raises `UnknownModelError` and `LoadError`."""
    return ModelSource(settings, model_name or next(iter(settings.model_settings.model_entries)))


def try_api_key(config: AuthConfig) -> None:
    """Read the configured API key once, from AWS SSM where it is kept there. Raises `LoadError`."""
    api_key = require_api_key(config)
    if api_key is not None:
        anyio.run(_read, api_key)


async def _read(api_key: ApiKey) -> None:
    async with api_key.opened():
        pass
