"""The tables of the SQLite job store."""

import sqlite3
from pathlib import Path

from modalkit.service.jobs.errors import JobStoreSchemaError

APPLICATION_ID = 0x6D6F646B
"""The application id of databases of modalkit: "modk"."""

CACHE_BYTES = 16 * 2**20

CHECKPOINT_PAGES = 4000
"""Pages in the write-ahead log after which they are copied to the database: four times SQLite's default.

A page is copied once, however often it was written, and each copying waits for the disk.
"""

LOG_BYTES = 64 * 2**20
"""Bytes of the disk that the write-ahead log keeps: a long reading, as for a backup, makes it larger for a while."""

VERSION = 7
"""The version of the tables. A database of another one is refused."""

TABLES = """
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL UNIQUE,
        model_name TEXT NOT NULL,
        status TEXT NOT NULL,
        success_queue TEXT,
        failure_queue TEXT,
        priority TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        idempotency_key TEXT,
        owner TEXT NOT NULL,
        traceparent TEXT,
        batch_id TEXT,
        line INTEGER,
        started_at INTEGER,
        finished_at INTEGER,
        crashes INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        retry_at INTEGER,
        delivery TEXT NOT NULL,
        delivery_queue TEXT,
        delivery_attempts INTEGER NOT NULL DEFAULT 0,
        delivery_crashes INTEGER NOT NULL DEFAULT 0,
        due_at INTEGER,
        meta TEXT NOT NULL,
        error TEXT,
        delivery_error TEXT,
        message TEXT NOT NULL,
        result TEXT
    ) STRICT;
    CREATE INDEX queued_jobs ON jobs (model_name, priority, owner, seq)
        WHERE status = 'queued' AND crashes = 0 AND retry_at IS NULL;
    CREATE INDEX waiting_retries ON jobs (model_name, retry_at) WHERE status = 'queued' AND retry_at IS NOT NULL;
    CREATE INDEX suspect_jobs ON jobs (model_name, crashes, seq) WHERE status = 'queued' AND crashes > 0;
    CREATE INDEX expiring_jobs ON jobs (expires_at) WHERE status = 'queued' AND expires_at IS NOT NULL;
    CREATE INDEX running_jobs ON jobs (seq) WHERE status = 'running';
    CREATE INDEX failed_jobs ON jobs (seq) WHERE status = 'failed';
    CREATE INDEX cancelled_jobs ON jobs (seq) WHERE status = 'cancelled';
    CREATE INDEX expired_jobs ON jobs (seq) WHERE status = 'expired';
    CREATE INDEX removable_jobs ON jobs (finished_at)
        WHERE finished_at IS NOT NULL AND delivery IN ('none', 'delivered', 'memory');
    CREATE INDEX deliveries ON jobs (delivery_queue, due_at) WHERE due_at IS NOT NULL AND delivery_crashes = 0;
    CREATE INDEX suspect_deliveries ON jobs (delivery_crashes, seq) WHERE due_at IS NOT NULL AND delivery_crashes > 0;
    CREATE INDEX undelivered_jobs ON jobs (seq) WHERE delivery = 'undelivered';
    CREATE UNIQUE INDEX idempotency_keys ON jobs (idempotency_key, owner) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX owned_jobs ON jobs (owner, seq) WHERE owner <> '';
    CREATE INDEX batch_lines ON jobs (batch_id, line) WHERE batch_id IS NOT NULL;
    CREATE INDEX batch_states ON jobs (batch_id, owner, status) WHERE batch_id IS NOT NULL;
    CREATE INDEX batch_ends ON jobs (batch_id, finished_at, owner)
        WHERE batch_id IS NOT NULL AND finished_at IS NOT NULL;
    CREATE TABLE counts (status TEXT PRIMARY KEY, jobs INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE documents (
        document_id TEXT NOT NULL,
        part INTEGER NOT NULL,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        content BLOB NOT NULL,
        PRIMARY KEY (document_id, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX documents_by_age ON documents (created_at);
"""
"""Times are in microseconds since 1970. Long columns are the last ones, so that SQLite finds the others without
them. Older stores of this version have another order, so all SQL names its columns.

`due_at` is when the next attempt to deliver is due, -1 while it is claimed, and null where nothing is to be sent.
`retry_at` is when a queued job may run again, and null where it may at once. A job of a batch has a `batch_id` and its
`line`. `documents` are files of clients of other servers, in parts.
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, or create it with its tables; transactions are begun and ended explicitly.

    Raises `JobStoreSchemaError` for a database of another program or another version, and `sqlite3.Error`.
    """
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        is_new = _is_new(database, path)
        # Takes effect only before the first table: freed pages can then be given back to the disk.
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA fullfsync = ON")  # on macOS, where a plain one leaves the data in the drive's cache
        database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        database.execute("PRAGMA secure_delete = FAST")  # Debian's default writes all that is removed once more
        database.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        database.execute("PRAGMA busy_timeout = 5000")
        database.execute(f"PRAGMA cache_size = -{CACHE_BYTES // 1024}")
        if is_new:
            database.executescript(
                f"BEGIN IMMEDIATE; {TABLES}"
                f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
            )
    except BaseException:
        database.close()
        raise
    return database


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a second connection to the database, which reads what was committed."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA query_only = ON")
    return database


def _is_new(database: sqlite3.Connection, path: Path) -> bool:
    """Whether a database has no tables yet. Raises `JobStoreSchemaError` where it has others than `TABLES`."""
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
    if version != (VERSION if tables else 0):
        raise JobStoreSchemaError(
            path,
            f"has tables of version {version}, and this modalkit knows version {VERSION}",
            "use the modalkit that made it, or give another store_path",
        )
    return not tables
