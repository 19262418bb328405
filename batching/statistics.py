"""What the scheduler tells about itself: an immutable snapshot."""

from collections.abc import Mapping
from dataclasses import dataclass

from batching.request import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """The state of a scheduler at one moment. Counts of requests and batches are since it was opened."""

    queued: Mapping[Priority, int]
    """Requests that wait, by class."""
    running: int
    """Requests in batches that run now."""
    accepted: int
    """Requests that entered the queue; each is then waiting, running, or one of the following four."""
    succeeded: int
    failed: int
    expired: int
    """Requests whose deadline passed before their result was there."""
    cancelled: int
    """Requests whose callers went away before their result was there."""
    refused: int
    """Requests that were turned away because the queue was full."""
    batch_sizes: Mapping[int, int]
    """How many batches of each size ran; the parts of a failed batch that run again are not counted."""
    real_tokens: int
    """The sum of the sizes of all requests in those batches."""
    padded_tokens: int
    """The same, counting each request at the size of the largest in its batch."""
    busy_s: float
    """Seconds that batches ran, summed over all that ran at the same time."""
    stuck_threads: int
    """Calls that ran past the batch timeout and have still not come back; each holds a thread."""

    @property
    def batches(self) -> int:
        """How many batches ran."""
        return sum(self.batch_sizes.values())

    @property
    def mean_batch_size(self) -> float:
        """Requests in an average batch; 0 when none ran."""
        requests = sum(size * batches for size, batches in self.batch_sizes.items())
        return requests / self.batches if self.batches else 0.0

    @property
    def padding_share(self) -> float:
        """The part of all padded tokens that was padding, from 0 to below 1."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0
