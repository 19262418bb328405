"""Options and steps that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.loading import ModelSource
from service.settings import Settings

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="A configuration file; may be repeated, later ones win.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Which of the configured models; the first if left out.", show_default=False),
]

notices = Console(stderr=True, soft_wrap=True, highlight=False)
"""For people; standard output is for results."""


def model_source(settings: Settings, model_name: str | None) -> ModelSource:
    """The model of that name, by default the first; raises `UnknownModelError` and `LoadError`."""
    return ModelSource(settings, model_name or next(iter(settings.model_settings.model_entries)))
