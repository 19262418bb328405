"""``modalkit jobs backup``: copy the job store into a file while the service goes on."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from modalkit.pipelines.files import replacing
from modalkit.service.cli.common import ConfigFiles, notices
from modalkit.service.errors import ServiceError
from modalkit.service.jobs.sqlite_schema import open_for_reading
from modalkit.service.settings import Settings


class BackupError(ServiceError):
    """Raised when the job store could not be copied."""


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.", dir_okay=False)],
    config: ConfigFiles = None,
) -> None:
    """Copy the job store into a file, as it is at one moment. The service may run and goes on meanwhile.

    The copy is a job store itself. To restore it, stop the service, put the file in the place of
    async_config.store_path without the files -wal and -shm beside it, and start the service: jobs that were unfinished
    in the copy run, also if they have run since it was made.

    [bold]Examples[/bold]

    modalkit jobs backup /backups/jobs-2026-11-28.db
    """
    settings = Settings.load(config).app_settings.async_config
    if settings.store == "memory":
        raise typer.BadParameter("the service keeps its jobs in its memory (async_config.store: memory)")
    source = Path(settings.store_path)
    if not source.is_file():
        raise BackupError(f"there is no job store at {source} (async_config.store_path)")
    if file.exists():
        raise typer.BadParameter(f"{file} exists: name a file that does not", param_hint="FILE")
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}: make it, or name another file", param_hint="FILE")
    try:
        with (
            replacing(file) as new,
            closing(open_for_reading(source)) as database,
            closing(sqlite3.connect(new)) as copy,
        ):
            database.backup(copy)  # in one transaction
    except sqlite3.Error as error:
        raise BackupError(f"{source} could not be copied to {file}: {error}") from error
    notices.print(f"The jobs are in {file}")
