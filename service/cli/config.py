"""``modalkit config``: the configuration that is in effect and where each value comes from, or all defaults."""

from importlib import resources
from typing import Annotated

import typer
from pydantic_core import to_json

from modalkit.service.cli.common import AsJson, ConfigFiles
from modalkit.service.settings import effective_settings, effective_yaml


def config(
    config: ConfigFiles = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print every key with its default and what it does, as a file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the configuration that is in effect, with the file and line, or the variable, of what is no default.

    Secrets are hidden. With --defaults, what is printed is a configuration file in which every key is explained. With
    --json, an object has the `settings`, and the `origins` of those that are no defaults.

    [bold]Examples[/bold]

    modalkit config

    MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=64 modalkit config --config production.yaml

    modalkit config --defaults > modalkit.yaml
    """
    if defaults and config:
        raise typer.BadParameter("--defaults reads no --config: leave one of them out")
    if as_json:
        settings, origins = effective_settings([], {}) if defaults else effective_settings(config)
        by_key = {".".join(path): origin for path, origin in origins.items()}
        typer.echo(to_json({"settings": settings, "origins": by_key}))
        return
    typer.echo(defaults_yaml() if defaults else effective_yaml(config), nl=False)


def defaults_yaml() -> str:
    """The text of modalkit's own modalkit.yaml: every key, commented, at its default."""
    return resources.files("modalkit").joinpath("modalkit.yaml").read_text(encoding="utf-8")
