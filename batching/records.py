"""What is told of each batch: an immutable record."""

from dataclasses import dataclass

from modalkit.batching.policy import DispatchReason
from modalkit.batching.request import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch after it ran. Times are in seconds, sizes in the pipeline's unit (tokens, for text)."""

    count: int
    """Requests in the batch."""
    failed: int
    """How many of them got an error."""
    put_back: int = 0
    """How many of them wait again, for a later batch, because this one failed and they did not run by themselves."""
    priority: Priority
    reason: DispatchReason
    """Why it was sent off as it was."""
    real_tokens: int
    """The sum of the sizes."""
    padded_tokens: int
    """The same, each request counted at the size of the largest."""
    queue_s: float
    """How long the requests had waited when the batch was formed, on average."""
    oldest_queue_s: float
    """How long the one that waited longest had."""
    preprocess_s: float
    """Seconds in the first stage. This and the next two are 0 where the batch failed and ran again in parts."""
    predict_s: float
    """Seconds in the second stage, or in the whole of what has no stages."""
    postprocess_s: float
    """Seconds in the third stage."""
    total_s: float
    """Seconds from when the batch was formed until its requests had their outcomes."""
    predicted_s: float
    """Seconds of its stages together, as predicted before it ran."""
    overlapped: bool
    """Whether its first stage ran beside the second of the batch before."""

    @property
    def padding_share(self) -> float:
        """The part of the padded tokens that was padding, from 0 to below 1."""
        return 1 - self.real_tokens / self.padded_tokens

    @property
    def measured_s(self) -> float:
        """Seconds of its stages together: what `predicted_s` predicts."""
        return self.preprocess_s + self.predict_s + self.postprocess_s
