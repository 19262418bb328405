"""The tables of the SQLite job store, and how older versions of them become today's."""

import sqlite3
from pathlib import Path

from service.jobs.errors import JobStoreSchemaError

APPLICATION_ID = 0x6D6F646B
"""Marks a database as modalkit's: "modk"."""

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL UNIQUE,
        model_name TEXT NOT NULL,
        status TEXT NOT NULL,
        message TEXT NOT NULL,
        success_queue TEXT,
        failure_queue TEXT,
        meta TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        delivery TEXT NOT NULL,
        result TEXT,
        error TEXT,
        started_at INTEGER,
        finished_at INTEGER,
        delivery_attempts INTEGER NOT NULL DEFAULT 0,
        delivery_error TEXT
    ) STRICT;
    CREATE INDEX queued_jobs ON jobs (model_name, seq) WHERE status = 'queued';
    CREATE INDEX running_jobs ON jobs (seq) WHERE status = 'running';
    CREATE INDEX pending_deliveries ON jobs (finished_at, job_id) WHERE delivery = 'pending';
    CREATE INDEX ended_jobs ON jobs (finished_at) WHERE finished_at IS NOT NULL;
    CREATE TABLE counts (status TEXT PRIMARY KEY, jobs INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE jobs ADD COLUMN priority TEXT NOT NULL DEFAULT 'bulk';
    DROP INDEX queued_jobs;
    CREATE INDEX queued_jobs ON jobs (model_name, priority, seq) WHERE status = 'queued';
    """,
)
"""Step n makes version n + 1 of the tables from version n. Times are in microseconds since 1970."""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, new or of any version so far, ready for transactions that we begin ourselves.

    Raises `JobStoreSchemaError` for a database that is not ours or is newer, and `sqlite3.Error`.
    """
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        _check_owner(database, path)
        # Takes effect only before the first table: freed pages can then be given back to the disk.
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA busy_timeout = 5000")
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _check_owner(database: sqlite3.Connection, path: Path) -> None:
    try:
        (application_id,) = database.execute("PRAGMA application_id").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname not in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
            raise
        raise JobStoreSchemaError(
            path, f"is no SQLite database ({error})", "move that file away, or give another store_path"
        ) from error
    if tables and application_id != APPLICATION_ID:
        raise JobStoreSchemaError(path, "belongs to another program", "give another store_path")
    if version > len(MIGRATIONS):
        raise JobStoreSchemaError(
            path,
            f"has tables of version {version}, newer than the {len(MIGRATIONS)} that this modalkit knows",
            "update modalkit, or give another store_path",
        )


def _migrate(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    for step in range(version, len(MIGRATIONS)):
        database.executescript(
            f"BEGIN IMMEDIATE; {MIGRATIONS[step]}"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {step + 1}; COMMIT;"
        )
