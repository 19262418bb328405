"""The record of one batch, for metrics and logs."""

from dataclasses import dataclass

from modalkit.batching.policy import DispatchReason
from modalkit.batching.request import Priority


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
    queue_s: float
    """Mean seconds that the requests had waited when the batch was formed."""
    oldest_queue_s: float
    """Seconds that the oldest request had waited then."""
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
    def padding_share(self) -> float:
        """The share of the padded tokens that was padding, from 0 to below 1."""
        return 1 - self.real_tokens / self.padded_tokens

    @property
    def measured_s(self) -> float:
        """Seconds that its stages together took; compare it with `predicted_s`."""
        return self.preprocess_s + self.predict_s + self.postprocess_s
