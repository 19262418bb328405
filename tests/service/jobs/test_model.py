"""The ids of jobs."""

import os
import time
from uuid import RFC_4122, UUID

from modalkit.service.jobs.model import IDS_PER_READ, new_job_id, new_job_ids


def test_ids_differ_and_sort_by_the_time_they_were_made() -> None:
    started_ms = time.time_ns() // 1_000_000
    ids = [UUID(each) for count in (1, 2, IDS_PER_READ, 2 * IDS_PER_READ) for each in new_job_ids(count)]
    assert len(set(ids)) == len(ids)
    assert {(each.version, each.variant) for each in ids} == {(7, RFC_4122)}
    times_ms = [each.int >> 80 for each in ids]
    assert times_ms == sorted(times_ms)
    assert started_ms <= times_ms[0] <= times_ms[-1] <= time.time_ns() // 1_000_000


def test_a_process_that_is_forked_makes_other_ids() -> None:
    """Though it is forked while the parent has some random numbers left."""
    new_job_id()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, new_job_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100)[13:] != new_job_id()[13:].encode()
    os.close(reader)
    os.close(writer)
