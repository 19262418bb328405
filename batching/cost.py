"""Predicts what a batch costs, so that the policy can tell which companions are worth their padding."""

from dataclasses import dataclass
from typing import Protocol


class CostModel(Protocol):
    """Predicts the seconds that a batch takes, and may learn from those that ran."""

    def predict_s(self, count: int, longest: int, total: int) -> float:
        """Seconds for a batch of `count` requests whose largest has size `longest` and whose sizes sum to `total`."""
        ...  # a protocol method has no body

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Take note that such a batch took `elapsed_s` seconds."""
        ...


@dataclass(frozen=True, slots=True)
class PaddedCostModel:
    """A batch costs a fixed time, and a time for each token after all requests are padded to the longest.

    Learns nothing. The defaults were measured with the bundled model on two CPU cores. Only their ratio decides how
    batches are formed: a batch has to save about `fixed_s / token_s` tokens of fixed cost to be worth as many tokens of
    padding.
    """

    fixed_s: float = 0.005
    token_s: float = 0.000_1

    def predict_s(self, count: int, longest: int, total: int) -> float:  # noqa: ARG002  # padding hides the total
        """Seconds for a batch of `count` requests padded to `longest`."""
        return self.fixed_s + self.token_s * count * longest

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Do nothing: this model is what it was made."""
