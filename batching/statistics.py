"""What is recorded of each batch, and of all: for metrics and logs."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modalkit.batching.policy import Batch, DispatchReason
from modalkit.batching.request import Priority

RECENT_BATCHES = 256
"""How many of the last batches the statistics hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch after it ran. Times are in seconds, sizes in the pipeline's unit (tokens, for text)."""

    count: int
    """Requests in the batch."""
    failed: int
    """Requests of it that got an error."""
    errors: tuple[Exception, ...] = ()
    """The error of each of these, the same one for several that failed together. Frames of errors may hold tensors:
    release them soon."""
    requeued: int = 0
    """Requests of it that wait again for a later batch: this one failed, and they did not run in a part of it."""
    priority: Priority
    """The lane of the anchor."""
    reason: DispatchReason
    """Why it was dispatched as it was."""
    real_tokens: int
    """The sum of the sizes."""
    padded_tokens: int
    """The sum of the sizes, with each request counted at the size of the largest."""
    waits_s: Mapping[Priority, Sequence[float]]
    """Seconds that each request had waited when the batch was formed, by lane."""
    sizes: Sequence[int] = ()
    """The sizes of the requests: first those of the anchor's lane, as in `waits_s`, then those of the other lane."""
    tags: Sequence[str] = ()
    """The tags of the requests, each once."""
    device: int = 0
    """The index of the device that ran it."""
    formed_s: float = 0.0
    """When it was formed, by the clock of the event loop."""
    preprocess_s: float
    """Seconds in the first stage. This and the next two are 0 if the batch failed and ran again in parts."""
    predict_s: float
    """Seconds in the second stage, or in the whole batch if it has no stages."""
    postprocess_s: float
    """Seconds in the third stage."""
    total_s: float
    """Seconds from when the batch was formed until its requests had their outcomes."""
    predicted_s: float
    """Seconds that its stages together were predicted to take."""
    overlapped: bool
    """Whether its first stage ran at the same time as the second stage of the batch before."""

    @property
    def queue_s(self) -> float:
        """Mean seconds that the requests had waited when the batch was formed."""
        return sum(map(sum, self.waits_s.values())) / self.count

    @property
    def padding_share(self) -> float:
        """The share of the padded tokens that was padding, from 0 to below 1."""
        return 1 - self.real_tokens / self.padded_tokens

    @property
    def measured_s(self) -> float:
        """Seconds that its stages together took; compare it with `predicted_s`."""
        return self.preprocess_s + self.predict_s + self.postprocess_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """The state of a scheduler at one moment. Counts of requests and batches are since it was opened."""

    queued: Mapping[Priority, int]
    """Requests that wait, by lane."""
    work_s: Mapping[Priority, float]
    """Seconds that one worker, on the fastest device, is predicted to need for those that wait, by lane."""
    oldest_s: Mapping[Priority, float]
    """Seconds that the oldest waiting request of each lane has waited; 0 where none waits."""
    running: int
    """Requests in batches that run now, those of cancelled callers included."""
    accepted: int
    """Requests that entered the queue."""
    succeeded: int
    failed: int
    expired: int
    """Requests whose deadline passed before they had a result."""
    cancelled: int
    """Requests whose callers were cancelled before they had a result."""
    refused: int
    """Requests that were refused because the queue was full."""
    batch_sizes: Mapping[int, int]
    """How many batches of each size ran. Parts of a failed batch that ran again are not counted."""
    real_tokens: int
    """The sum of the sizes of all requests in those batches."""
    padded_tokens: int
    """The same, with each request counted at the size of the largest in its batch."""
    busy_s: float
    """Seconds that batches ran, summed over batches that ran at the same time."""
    predict_s: float
    """Seconds that they spent in the second stage, or in the whole batch if it has no stages."""
    open_s: float
    """Seconds since the scheduler was opened, times the number of batches that may run at once."""
    stuck_threads: int
    """Calls that ran past the batch timeout and have not returned; each holds a thread."""
    recent: Sequence[BatchRecord] = ()
    """The last batches, the newest last, without their errors; there are `RECENT_BATCHES` at most, and none where the
    scheduler has no `on_batch`."""

    @property
    def queued_s(self) -> float:
        """Seconds that one worker, on the fastest device, is predicted to need for all that wait."""
        return sum(self.work_s.values())

    @property
    def queue_depth(self) -> int:
        """Requests that wait."""
        return sum(self.queued.values())

    @property
    def batches(self) -> int:
        """How many batches ran."""
        return sum(self.batch_sizes.values())

    @property
    def mean_batch_size(self) -> float:
        """The mean number of requests in a batch; 0 when none ran."""
        requests = sum(size * batches for size, batches in self.batch_sizes.items())
        return requests / self.batches if self.batches else 0.0

    @property
    def padding_share(self) -> float:
        """The share of the padded tokens that was padding, from 0 to below 1."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def utilisation(self) -> float:
        """The share of the time in which the second stage, the model itself, ran; 0 before the scheduler was opened."""
        return self.predict_s / self.open_s if self.open_s else 0.0


class Telemetry:
    """The counters behind `SchedulerStatistics`."""

    def __init__(self) -> None:
        self.accepted = self.succeeded = self.failed = self.expired = self.cancelled = self.refused = 0
        self._batch_sizes: Counter[int] = Counter()
        self._real_tokens = self._padded_tokens = 0
        self._busy_s = self._predict_s = 0.0
        self._recent: deque[BatchRecord] = deque(maxlen=RECENT_BATCHES)

    def count_batch(self, batch: Batch[Any], total_s: float, predict_s: float) -> None:
        """Count a batch that ran for `total_s` seconds, of them `predict_s` in its second stage."""
        self._batch_sizes[len(batch.requests)] += 1
        self._real_tokens += batch.total
        self._padded_tokens += batch.padded_tokens
        self._busy_s += total_s
        self._predict_s += predict_s

    def keep(self, record: BatchRecord) -> None:
        """Keep the record of a batch, one of the last."""
        self._recent.append(replace(record, errors=()) if record.errors else record)  # errors may hold tensors

    def snapshot(
        self,
        *,
        queued: Mapping[Priority, int],
        work_s: Mapping[Priority, float],
        oldest_s: Mapping[Priority, float],
        running: int,
        open_s: float,
        stuck_threads: int,
    ) -> SchedulerStatistics:
        """The statistics now; the arguments are what only the scheduler knows."""
        return SchedulerStatistics(
            queued=queued,
            work_s=work_s,
            oldest_s=oldest_s,
            running=running,
            accepted=self.accepted,
            succeeded=self.succeeded,
            failed=self.failed,
            expired=self.expired,
            cancelled=self.cancelled,
            refused=self.refused,
            batch_sizes=dict(self._batch_sizes),
            real_tokens=self._real_tokens,
            padded_tokens=self._padded_tokens,
            busy_s=self._busy_s,
            predict_s=self._predict_s,
            open_s=open_s,
            stuck_threads=stuck_threads,
            recent=tuple(self._recent),
        )
