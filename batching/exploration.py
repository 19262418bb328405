"""Tries larger batches than the measured costs speak for, at a bounded price: a cost may have been measured wrongly."""

SHARE = 0.02  # of the running time, at most, may be lost to trying
MOST_EARNED_BATCHES = 1024  # what more of them earn is forgotten
FIRST_PATIENCE = 8
LAST_PATIENCE = 1024


class Exploration:
    """Says when a full batch is tried although smaller ones are predicted to be cheaper.

    Every batch earns a share of its time; a try is allowed once what it is predicted to lose has been earned, and costs
    what it really lost. After a try that lost time, twice as many batches pass before the next. So the regret is at
    most `SHARE` of the running time, and what one try lost more than predicted.
    """

    def __init__(self) -> None:
        self._earned_s = 0.0
        self._patience = FIRST_PATIENCE
        self._batches_to_next_try = FIRST_PATIENCE

    def is_due(self, predicted_loss_s: float) -> bool:
        """Whether to try now what is predicted to lose so many seconds."""
        return self._batches_to_next_try <= 0 and predicted_loss_s <= self._earned_s

    def batch_finished(self, elapsed_s: float) -> None:
        """Account for a batch that was no try."""
        self._batches_to_next_try -= 1
        self._earned_s = min(self._earned_s + SHARE * elapsed_s, MOST_EARNED_BATCHES * SHARE * elapsed_s)

    def try_finished(self, lost_s: float) -> None:
        """Account for a try, which lost so many seconds, or won some."""
        self._earned_s -= max(0.0, lost_s)
        if lost_s > 0:
            self._patience = min(2 * self._patience, LAST_PATIENCE)
        else:
            self._patience = FIRST_PATIENCE
        self._batches_to_next_try = self._patience
