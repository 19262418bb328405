"""The tables of the SQLite job store, and how older versions of them become today's."""

import sqlite3
from pathlib import Path

from modalkit.service.jobs.errors import JobStoreSchemaError

APPLICATION_ID = 0x6D6F646B
"""The application id of databases of modalkit: "modk"."""

CACHE_BYTES = 16 * 2**20

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
    """
    ALTER TABLE jobs ADD COLUMN expires_at INTEGER;
    ALTER TABLE jobs ADD COLUMN idempotency_key TEXT;
    ALTER TABLE jobs ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN delivery_queue TEXT;
    ALTER TABLE jobs ADD COLUMN due_at INTEGER;
    UPDATE jobs SET due_at = 0, delivery_queue = iif(status = 'succeeded', success_queue, failure_queue)
        WHERE delivery = 'pending';
    UPDATE jobs SET delivery_queue = iif(status = 'succeeded', success_queue, failure_queue)
        WHERE delivery = 'undelivered';
    DROP INDEX queued_jobs;
    DROP INDEX pending_deliveries;
    DROP INDEX ended_jobs;
    CREATE INDEX queued_jobs ON jobs (model_name, priority, seq) WHERE status = 'queued' AND crashes = 0;
    CREATE INDEX suspect_jobs ON jobs (model_name, crashes, seq) WHERE status = 'queued' AND crashes > 0;
    CREATE INDEX expiring_jobs ON jobs (expires_at) WHERE status = 'queued' AND expires_at IS NOT NULL;
    CREATE INDEX deliveries ON jobs (delivery_queue, due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX undelivered_jobs ON jobs (seq) WHERE delivery = 'undelivered';
    CREATE INDEX removable_jobs ON jobs (finished_at)
        WHERE finished_at IS NOT NULL AND delivery IN ('none', 'delivered');
    CREATE INDEX failed_jobs ON jobs (seq) WHERE status = 'failed';
    CREATE INDEX cancelled_jobs ON jobs (seq) WHERE status = 'cancelled';
    CREATE INDEX expired_jobs ON jobs (seq) WHERE status = 'expired';
    CREATE UNIQUE INDEX idempotency_keys ON jobs (idempotency_key) WHERE idempotency_key IS NOT NULL;
    INSERT INTO counts SELECT 'delivery ' || delivery, count(*) FROM jobs GROUP BY delivery;
    """,
    """
    ALTER TABLE jobs ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN retry_at INTEGER;
    ALTER TABLE jobs ADD COLUMN delivery_crashes INTEGER NOT NULL DEFAULT 0;
    DROP INDEX queued_jobs;
    DROP INDEX deliveries;
    CREATE INDEX queued_jobs ON jobs (model_name, priority, seq)
        WHERE status = 'queued' AND crashes = 0 AND retry_at IS NULL;
    CREATE INDEX waiting_retries ON jobs (model_name, retry_at) WHERE status = 'queued' AND retry_at IS NOT NULL;
    CREATE INDEX deliveries ON jobs (delivery_queue, due_at) WHERE due_at IS NOT NULL AND delivery_crashes = 0;
    CREATE INDEX suspect_deliveries ON jobs (delivery_crashes, seq) WHERE due_at IS NOT NULL AND delivery_crashes > 0;
    """,
    """
    ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    DROP INDEX queued_jobs;
    DROP INDEX idempotency_keys;
    CREATE INDEX queued_jobs ON jobs (model_name, priority, owner, seq)
        WHERE status = 'queued' AND crashes = 0 AND retry_at IS NULL;
    CREATE UNIQUE INDEX idempotency_keys ON jobs (idempotency_key, owner) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX owned_jobs ON jobs (owner, seq) WHERE owner <> '';
    """,
    """
    ALTER TABLE jobs ADD COLUMN traceparent TEXT;
    """,
    """
    ALTER TABLE jobs ADD COLUMN batch_id TEXT;
    ALTER TABLE jobs ADD COLUMN line INTEGER;
    CREATE INDEX batch_lines ON jobs (batch_id, line) WHERE batch_id IS NOT NULL;
    CREATE INDEX batch_states ON jobs (batch_id, owner, status) WHERE batch_id IS NOT NULL;
    CREATE INDEX batch_ends ON jobs (batch_id, finished_at, owner)
        WHERE batch_id IS NOT NULL AND finished_at IS NOT NULL;
    DROP INDEX removable_jobs;
    CREATE INDEX removable_jobs ON jobs (finished_at)
        WHERE finished_at IS NOT NULL AND delivery IN ('none', 'delivered', 'memory');
    CREATE TABLE documents (
        document_id TEXT NOT NULL,
        part INTEGER NOT NULL,
        owner TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        content BLOB NOT NULL,
        PRIMARY KEY (document_id, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX documents_by_age ON documents (created_at);
    """,
)
"""Step n makes version n + 1 of the tables from version n. Times are in microseconds since 1970.

`due_at` is when the next attempt to deliver is due, -1 while it is claimed, and null where nothing is to be sent.
`retry_at` is when a queued job may run again, and null where it may at once. A job of a batch has a `batch_id` and its
`line`. `documents` are files of clients of other servers, in parts.
"""


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create the database and migrate its tables; transactions are begun and ended explicitly.

    Raises `JobStoreSchemaError` for a database of another program or a newer version, and `sqlite3.Error`.
    """
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        _check_owner(database, path)
        # Takes effect only before the first table: freed pages can then be given back to the disk.
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA fullfsync = ON")  # on macOS, where a plain one leaves the data in the drive's cache
        database.execute("PRAGMA busy_timeout = 5000")
        database.execute(f"PRAGMA cache_size = -{CACHE_BYTES // 1024}")
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a second connection to the database, which reads what was committed."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA query_only = ON")
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
