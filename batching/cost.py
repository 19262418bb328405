"""Predicts how long a batch takes. The planner uses the prediction to decide which requests run together."""

from dataclasses import dataclass
from typing import Protocol

SHORTEST_S = 1e-9  # a batch that is predicted to take less counts as this


class CostModel(Protocol):
    """Predicts the seconds of a batch, and may learn from batches that ran."""

    def predict_s(self, count: int, longest: int, total: int) -> float:
        """Seconds for a batch of `count` requests whose largest has size `longest` and whose sizes sum to `total`."""
        ...  # a protocol method has no body

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Learn that such a batch took `elapsed_s` seconds."""
        ...


@dataclass(frozen=True, slots=True)
class PaddedCostModel:
    """A batch costs a fixed time, plus a time for each token after padding all requests to the longest.

    It learns nothing. The defaults were measured with the bundled model on two CPU cores. Only their ratio decides how
    batches are formed: one more batch is worth ``fixed_s / token_s`` tokens of padding.
    """

    fixed_s: float = 0.005
    token_s: float = 0.000_1

    def predict_s(self, count: int, longest: int, total: int) -> float:  # noqa: ARG002  # padding hides the total
        """Seconds for a batch of `count` requests padded to `longest`."""
        return self.fixed_s + self.token_s * count * longest

    def observe(self, count: int, longest: int, total: int, elapsed_s: float) -> None:
        """Do nothing: the costs of this model are fixed."""
