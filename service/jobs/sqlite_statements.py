"""The SQL statements of the job store."""

from modalkit.service.errors import MAX_ERROR_BYTES
from modalkit.service.jobs.sqlite_rows import NEW_JOB_COLUMNS, READ_COLUMNS, TEXT_COLUMNS

BYTES_PER_READ = 16 * 2**20
"""Bytes of JSON that jobs are claimed by at once, unless one has more: meanwhile they are written once more, for which
other changes wait.
"""
ESCAPED = 2
"""The most bytes that a byte of JSON takes when quoted as a string: JSON holds no control characters."""
ESCAPED_ERRORS = 2 * 6 * MAX_ERROR_BYTES
"""The most bytes that the two errors of a job take when quoted."""
CLAIMED = -1
"""Stored as `due_at` of a delivery that is claimed."""

INSERT = (
    f"INSERT INTO jobs ({', '.join(NEW_JOB_COLUMNS)}) VALUES "  # noqa: S608  # names of our own, no input
    "{rows}"
)
START = """
    UPDATE jobs SET status = 'running', started_at = coalesce(started_at, max(?, created_at))
    WHERE seq IN (SELECT value FROM json_each(?))
"""
CLAIM_DELIVERIES = f"UPDATE jobs SET due_at = {CLAIMED} WHERE seq IN (SELECT value FROM json_each(?))"  # noqa: S608  # as above
SIZE = " + ".join(f"coalesce(length(CAST({column} AS BLOB)), 0)" for column in TEXT_COLUMNS)  # in bytes
READ = f"""
    SELECT json_group_array(json_array(seq, {READ_COLUMNS})) FROM jobs WHERE seq IN (
        SELECT seq FROM (
            SELECT chosen.seq, sum(
                {ESCAPED} * ({SIZE}) + iif(coalesce(error, delivery_error) IS NULL, 0, {ESCAPED_ERRORS})
            ) OVER (ORDER BY chosen.seq ROWS UNBOUNDED PRECEDING) AS size
            FROM ({{chosen}}) AS chosen JOIN jobs USING (seq)
        ) WHERE size <= {BYTES_PER_READ}
    )
"""  # noqa: S608  # as above
SIZES = f"SELECT {SIZE}, {{columns}} FROM jobs WHERE seq IN ({{chosen}}) ORDER BY seq"  # noqa: S608  # as above
"""The bytes of each chosen job, and `columns` of it."""
READ_FIRST = f"SELECT seq, {READ_COLUMNS} FROM jobs WHERE seq = (SELECT min(seq) FROM ({{chosen}}))"  # noqa: S608  # as above
_CLAIMABLE = "status = 'queued' AND crashes = 0 AND retry_at IS NULL AND model_name = ?1 AND priority = ?2"
CLAIMABLE = f"SELECT seq FROM jobs WHERE {_CLAIMABLE} AND owner = ?3 ORDER BY seq LIMIT ?4"  # noqa: S608  # as above
IS_CLAIMABLE = f"SELECT EXISTS (SELECT 1 FROM jobs WHERE {_CLAIMABLE})"  # noqa: S608  # as above
OWNERS = f"""
    WITH RECURSIVE owners (owner) AS (
        SELECT min(owner) FROM jobs WHERE {_CLAIMABLE} AND {{which}}
        UNION ALL
        SELECT (SELECT min(owner) FROM jobs WHERE {_CLAIMABLE} AND {{which}} AND owner > owners.owner)
        FROM owners WHERE owner IS NOT NULL LIMIT ?3
    ) SELECT owner FROM owners WHERE owner IS NOT NULL
"""  # noqa: S608  # as above
FEWEST_CRASHES = """
    SELECT crashes FROM jobs WHERE status = 'queued' AND crashes > 0 AND model_name = ? ORDER BY crashes LIMIT 1
"""
QUARANTINED = """
    SELECT seq FROM jobs WHERE status = 'queued' AND crashes > 0 AND model_name = ? AND crashes <= ?
    ORDER BY crashes, seq LIMIT ?
"""
REQUEUE = """
    UPDATE jobs SET status = 'queued', attempts = attempts + 1, crashes = 0, retry_at = retry.column2,
        error = retry.column3
    FROM (VALUES {rows}) AS retry WHERE job_id = retry.column1 AND status = 'running'
"""
RETURN = """
    UPDATE jobs SET status = 'queued', started_at = iif(attempts = 0 AND crashes = 0, NULL, started_at)
    WHERE status = 'running' AND job_id IN (SELECT value FROM json_each(?))
"""
DUE_RETRIES = """
    SELECT seq FROM jobs WHERE status = 'queued' AND retry_at <= ? AND model_name = ? ORDER BY retry_at LIMIT ?
"""
RELEASE = "UPDATE jobs SET retry_at = NULL WHERE seq IN (SELECT value FROM json_each(?))"
NEXT_RETRY = """
    SELECT retry_at FROM jobs WHERE status = 'queued' AND retry_at IS NOT NULL AND model_name = ?
    ORDER BY retry_at LIMIT 1
"""
_QUEUE = "nullif(iif(ended.column2 = 'succeeded', success_queue, failure_queue), '')"
END = f"""
    UPDATE jobs SET status = ended.column2, result = ended.column3, error = ended.column4,
        finished_at = ended.column5, attempts = attempts + (status = 'running'), retry_at = NULL,
        delivery_queue = {_QUEUE}, delivery = iif({_QUEUE} IS NULL, 'none', 'pending'),
        due_at = iif({_QUEUE} IS NULL, NULL, ended.column7)
    FROM (VALUES {{rows}}) AS ended WHERE job_id = ended.column1 AND status = ended.column6
"""  # noqa: S608  # as above
COUNT_PENDING = """
    SELECT count(*) FROM jobs WHERE delivery = 'pending' AND job_id IN (SELECT value FROM json_each(?))
"""
EXPIRED = "SELECT seq FROM jobs WHERE status = 'queued' AND expires_at <= ? ORDER BY expires_at LIMIT ?"
REQUEUE_CRASHED = "UPDATE jobs SET status = 'queued', crashes = crashes + 1 WHERE status = 'running'"
CRASHED = "SELECT job_id FROM jobs WHERE status = 'queued' AND crashes > 0 AND crashes >= ?"
_NEXT_QUEUE = """
    SELECT delivery_queue FROM jobs WHERE due_at IS NOT NULL AND delivery_crashes = 0 AND delivery_queue > {after}
    ORDER BY delivery_queue LIMIT 1
"""
NEXT_QUEUE = _NEXT_QUEUE.format(after="?")
_DUE = "due_at BETWEEN 0 AND ?1 AND delivery_crashes = 0 AND delivery_queue"
# The last row has the first queue where something is due; or, after ?3 queues, one where nothing may be; or NULL.
NEXT_DUE_QUEUE = f"""
    WITH RECURSIVE visited (queue, number) AS (
        SELECT ({_NEXT_QUEUE.format(after="?2")}), 1
        UNION ALL
        SELECT ({_NEXT_QUEUE.format(after="visited.queue")}), number + 1 FROM visited
        WHERE queue IS NOT NULL AND number < ?3 AND NOT EXISTS (SELECT 1 FROM jobs WHERE {_DUE} = visited.queue)
    ) SELECT queue, max(number) FROM visited
"""  # noqa: S608  # as above
DUE = f"SELECT seq FROM jobs WHERE {_DUE} = ?2 ORDER BY due_at, seq LIMIT ?3"  # noqa: S608  # as above
FEWEST_DELIVERY_CRASHES = """
    SELECT delivery_crashes FROM jobs WHERE due_at IS NOT NULL AND due_at >= 0 AND delivery_crashes > 0
    ORDER BY delivery_crashes LIMIT 1
"""
QUARANTINED_DELIVERIES = """
    SELECT seq FROM jobs WHERE due_at IS NOT NULL AND due_at >= 0 AND delivery_crashes > 0 AND delivery_crashes <= ?
    ORDER BY delivery_crashes, seq LIMIT ?
"""
QUARANTINE_DELIVERIES = f"""
    UPDATE jobs SET due_at = ?, delivery_crashes = delivery_crashes + 1
    WHERE due_at IS NOT NULL AND due_at = {CLAIMED} AND {{which}}
"""  # noqa: S608  # as above
GIVE_UP_DELIVERIES = """
    UPDATE jobs SET delivery = 'undelivered', delivery_error = ?, due_at = NULL, delivery_crashes = 0
    WHERE due_at IS NOT NULL AND delivery_crashes > 0 AND delivery_crashes >= ? RETURNING job_id
"""
RECORD_DELIVERIES = """
    UPDATE jobs SET delivery = record.column2, delivery_attempts = record.column3, delivery_error = record.column4,
        due_at = record.column5, delivery_crashes = 0
    FROM (VALUES {rows}) AS record WHERE job_id = record.column1 AND delivery = 'pending'
"""
UNDELIVERED = "SELECT seq FROM jobs WHERE delivery = 'undelivered' AND {which} ORDER BY seq LIMIT ?"
REPLAY = """
    UPDATE jobs SET delivery = 'pending', delivery_attempts = 0, due_at = ?
    WHERE seq IN (SELECT value FROM json_each(?))
"""
REMOVE = """
    DELETE FROM jobs WHERE seq IN (
        SELECT seq FROM jobs
        WHERE finished_at IS NOT NULL AND finished_at < ? AND delivery IN ('none', 'delivered', 'memory') LIMIT ?
    ) RETURNING status, delivery
"""
PURGEABLE = "finished_at IS NOT NULL AND delivery <> 'pending'"
PURGE = f"""
    DELETE FROM jobs NOT INDEXED WHERE seq IN (SELECT value FROM json_each(?)) AND {PURGEABLE} AND {{which}}
    RETURNING status, delivery
"""  # noqa: S608  # as above
RETRYABLE = "status IN ('failed', 'expired', 'cancelled') AND delivery <> 'pending'"
RETRY = """
    UPDATE jobs SET status = 'queued', error = NULL, created_at = ?1, started_at = NULL, finished_at = NULL,
        crashes = 0, attempts = 0, retry_at = NULL, expires_at = expires_at - created_at + ?1, delivery = 'none',
        delivery_attempts = 0, delivery_error = NULL, delivery_crashes = 0, delivery_queue = NULL, due_at = NULL
    WHERE seq IN (SELECT value FROM json_each(?2))
"""
KNOWN_KEYS = """
    SELECT EXISTS (
        SELECT 1 FROM jobs JOIN json_each(?) AS given
        ON idempotency_key = given.value ->> 0 AND owner = given.value ->> 1
    )
"""
CANCEL = """
    UPDATE jobs SET status = 'cancelled', finished_at = ?, retry_at = NULL
    WHERE job_id IN (SELECT value FROM json_each(?))
"""
