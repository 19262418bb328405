"""The command ``modalkit`` and what all its subcommands share: configuration, errors as messages, exit codes."""

import io
import os
import sys
import warnings
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from modalkit.pipelines.files import NO_SPACE
from modalkit.service.cli.backup import backup
from modalkit.service.cli.check import check
from modalkit.service.cli.common import EXIT_AWAY, EXIT_FAILURE, EXIT_USAGE, notices
from modalkit.service.cli.config import config
from modalkit.service.cli.deploy import deploy
from modalkit.service.cli.init import init
from modalkit.service.cli.jobs import app as jobs_app
from modalkit.service.cli.jobs_client import AwayError
from modalkit.service.cli.predict import predict
from modalkit.service.cli.reload import reload
from modalkit.service.cli.serve import serve
from modalkit.service.cli.submit import submit
from modalkit.service.cli.tune import tune
from modalkit.service.errors import ServiceError, UsageError
from modalkit.service.loading import LoadError
from modalkit.service.logs import LogFormat, configure_logging
from modalkit.service.settings import SettingsError
from modalkit.service.version import VERSION

PLUGINS = "modalkit.commands"
"""The group of entry points by which other packages add commands: names of `typer.Typer` objects."""


class _Group(TyperGroup):
    """The commands of this package, and those of others, which are imported only when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, as ``--help`` lists them."""
        return [*super().list_commands(ctx), *sorted(entry_points(group=PLUGINS).names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None where there is none."""
        found = super().get_command(ctx, cmd_name)
        plugins = () if found else entry_points(group=PLUGINS, name=cmd_name)
        return next((get_command(plugin.load()) for plugin in plugins), found)


app = typer.Typer(
    name="modalkit",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (init, serve, predict, submit, check, config, deploy, tune, reload):
    app.command()(command)
jobs_app.command()(backup)
app.add_typer(jobs_app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"modalkit {VERSION}")
        raise typer.Exit


@app.callback()
def _modalkit(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run a model on batches of what many callers send one by one.

    Configuration: modalkit.yaml in the working directory, or the files in MODALKIT_CONFIG, or --config; single settings
    by MODALKIT_... variables. Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 a served model broke
    down; 4 all lines ran, some of them with errors; 5 the service is away.
    """


class _Stderr(io.TextIOWrapper):
    """Standard error that drops what cannot be written: on a full disk, or where its reader is gone, all else goes on.

    `print`, `flush` and Python's own flush at exit would raise. What is dropped no one could have read.
    """

    def write(self, text: str, /) -> int:
        """Write what can be written."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with suppress(OSError):
            super().flush()


def main() -> None:
    """Run the command line. Each error of modalkit becomes one message on standard error."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, Path(os.devnull).open("r+"))  # noqa: SIM115  # until the process ends
    stderr = sys.stderr
    sys.stderr = _Stderr(stderr.buffer, stderr.encoding, stderr.errors, line_buffering=True)
    configure_logging(LogFormat.TEXT)
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"modalkit: warning: {message}\n"
    # At the end, so that a folder with the name of an installed package does not hide the package.
    with suppress(FileNotFoundError):  # it was removed
        sys.path.append(str(Path.cwd()))
    try:
        app()
    except BrokenPipeError:
        # The reader of standard output has closed it; replacing it keeps Python from flushing it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    except (ServiceError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            remedy = "free some space" if error.errno in NO_SPACE else "correct the path, or its permissions"
            text = f"cannot use {error.filename}: {error.strerror}; {remedy}"
        notices.print(f"modalkit: error: {text}")
        is_usage = isinstance(error, UsageError | LoadError | SettingsError)
        sys.exit(EXIT_USAGE if is_usage else EXIT_AWAY if isinstance(error, AwayError) else EXIT_FAILURE)
