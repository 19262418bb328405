"""Remembers how large a batch may be, once one was too large for the device."""

import math

FIRST_PATIENCE = 16
LAST_PATIENCE = 1024
CLOSE = 0.8


class Ceiling:
    """The largest batch that is tried, in tokens after padding: infinite until one was too large.

    A batch that did not fit lowers the ceiling to half its size, or to the largest that did fit, if that is more. After
    some batches close below the ceiling it is raised by an eighth, to see whether there is more room by now; each time
    that fails, twice as many batches pass before the next try. (Additive increase with multiplicative decrease is how
    Clipper finds its batch sizes, NSDI 2017; here both steps are bounded by what is known to fit.)
    """

    def __init__(self) -> None:
        self.tokens: float = math.inf
        self._fitted = 0  # the largest batch that fitted since a smaller one did not
        self._is_trying = False  # whether the ceiling is above all that is known to fit
        self._patience = FIRST_PATIENCE
        self._batches_to_next_try = FIRST_PATIENCE

    def too_large(self, tokens: int) -> None:
        """A batch of `tokens` did not fit."""
        if tokens <= self._fitted:
            self._fitted = 0
        if self._is_trying and tokens <= self.tokens:
            self._patience = min(2 * self._patience, LAST_PATIENCE)
        self._is_trying = False
        self.tokens = min(self.tokens, max(1, tokens // 2, self._fitted))
        self._batches_to_next_try = self._patience

    def fitted(self, tokens: int) -> None:
        """A batch of `tokens` ran."""
        if tokens > self._fitted:
            self._fitted = tokens
        if tokens < CLOSE * self.tokens or math.isinf(self.tokens):
            return
        self._batches_to_next_try -= 1
        if self._batches_to_next_try <= 0:
            self.tokens += self.tokens // 8 + 1
            self._is_trying = True
            self._batches_to_next_try = self._patience
