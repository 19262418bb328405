"""Handles each result once, however often its message comes."""

import json
import sqlite3

TABLES = """
CREATE TABLE IF NOT EXISTS handled (job_id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS results_by_user (user_id TEXT PRIMARY KEY, results INTEGER);
"""


def handle(database: sqlite3.Connection, message: str) -> bool:
    """Count a result for its user. Returns False, and changes nothing, if its job was handled before."""
    job = json.loads(message)
    with database:  # one transaction: both rows are written, or neither
        if not database.execute("INSERT OR IGNORE INTO handled VALUES (?)", [job["job_id"]]).rowcount:
            return False
        database.execute(
            "INSERT INTO results_by_user VALUES (?, 1) ON CONFLICT DO UPDATE SET results = results + 1",
            [job["meta"]["user_id"]],
        )
    return True
