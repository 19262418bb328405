"""``modalkit config``: the configuration that is in effect and where each value comes from, or all defaults."""

from importlib import resources
from typing import Annotated

import typer

from modalkit.service.cli.common import ConfigFiles
from modalkit.service.settings import effective_yaml


def config(
    config: ConfigFiles = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print every key with its default and what it does, as a file.")
    ] = False,
) -> None:
    """Print the configuration that is in effect, with the file and line, or the variable, of what is no default.

    Secrets are hidden. With --defaults, what is printed is a configuration file in which every key is explained.

    [bold]Examples[/bold]

    modalkit config

    MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=64 modalkit config --config production.yaml

    modalkit config --defaults > modalkit.yaml
    """
    if defaults and config:
        raise typer.BadParameter("--defaults reads no --config: leave one of them out")
    typer.echo(defaults_yaml() if defaults else effective_yaml(config), nl=False)


def defaults_yaml() -> str:
    """The text of modalkit's own modalkit.yaml: every key, commented, at its default."""
    return resources.files("modalkit").joinpath("modalkit.yaml").read_text(encoding="utf-8")
