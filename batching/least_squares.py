"""Least squares with coefficients that are never negative, for a handful of unknowns, in plain Python."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

RIDGE = 1e-6  # relative to the diagonal: divides a cost evenly among unknowns that the data cannot distinguish
TOLERANCE = 1e-9


def solve_nonnegative(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], reluctance: Sequence[float]
) -> list[float]:
    """The x >= 0 that minimises x'Ax / 2 - b'x, for normal equations `matrix` A and `vector` b.

    The active-set method of Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23, on columns scaled
    to length one. An unknown that no observation contains (a zero diagonal) is 0. If the data cannot distinguish some
    unknowns, each gets a share in inverse proportion to its `reluctance`.
    """
    scale = [1 / math.sqrt(matrix[i][i]) if matrix[i][i] > 0 else 0.0 for i in range(len(vector))]
    ridge = [RIDGE * value for value in reluctance]
    a = [
        [value * scale[i] * scale[j] + (ridge[i] if i == j else 0) for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    b = [value * factor for value, factor in zip(vector, scale, strict=True)]
    x = [0.0] * len(b)
    free: list[int] = []
    # Each round adds the unknown whose increase helps most. Because of rounding it might never end, so rounds are
    # limited.
    for _ in range(3 * len(b)):
        slopes = {i: b[i] - sum(a[i][j] * x[j] for j in free) for i in range(len(b)) if i not in free}
        best = max(slopes, key=slopes.__getitem__, default=None)
        if best is None or slopes[best] <= TOLERANCE * abs(b[best]):
            break
        free.append(best)
        x = _settle(a, b, x, free)
    return [value * factor for value, factor in zip(x, scale, strict=True)]


def _settle(a: list[list[float]], b: list[float], x: list[float], free: list[int]) -> list[float]:
    """Solve for the `free` unknowns. Those that would become negative are set to 0 and removed from `free`."""
    while True:
        solution = dict(zip(free, _solve([[a[i][j] for j in free] for i in free], [b[i] for i in free]), strict=True))
        negative = [i for i in free if solution[i] <= 0]
        if not negative:
            return [solution.get(i, 0.0) for i in range(len(x))]
        step = min(x[i] / (x[i] - solution[i]) if x[i] > solution[i] else 0.0 for i in negative)
        x = [x[i] + step * (solution[i] - x[i]) if i in solution else 0.0 for i in range(len(x))]
        free[:] = [i for i in free if solution[i] > 0 or x[i] > TOLERANCE]
        if not free:
            return [0.0] * len(x)


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Solve a positive definite system by elimination, which needs no pivoting. Changes its arguments."""
    size = len(vector)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
            vector[k] -= factor * vector[i]
    for i in reversed(range(size)):
        vector[i] = (vector[i] - sum(matrix[i][j] * vector[j] for j in range(i + 1, size))) / matrix[i][i]
    return vector


class NormalEquations:
    """The sums A'A and A'b of any number of weighted observations. Each row of A is divided by its value, so b is 1."""

    def __init__(self, features: int) -> None:
        self.matrix = [[0.0] * features for _ in range(features)]
        self.vector = [0.0] * features

    def add(self, features: Sequence[float], value: float, weight: float) -> None:
        """Add an observation: its features and its measured `value`, which is positive."""
        row = [(i, feature / value) for i, feature in enumerate(features) if feature]
        for i, left in row:
            weighted = weight * left
            self.vector[i] += weighted
            line = self.matrix[i]
            for j, right in row:
                line[j] += weighted * right

    def scale_weights(self, factor: float) -> None:
        """Multiply the weight of all observations so far by `factor`."""
        self.matrix = [[value * factor for value in row] for row in self.matrix]
        self.vector = [value * factor for value in self.vector]

    def scale_values(self, factor: float) -> None:
        """Multiply the value of all observations so far by `factor`."""
        self.matrix = [[value / factor**2 for value in row] for row in self.matrix]
        self.vector = [value / factor for value in self.vector]

    def solve_with(self, other: "NormalEquations", weight: float, reluctance: Sequence[float]) -> list[float]:
        """The nonnegative coefficients that fit best; the observations of `other` have a weight of `weight`."""
        matrix = [
            [left + weight * right for left, right in zip(*rows, strict=True)]
            for rows in zip(self.matrix, other.matrix, strict=True)
        ]
        vector = [left + weight * right for left, right in zip(self.vector, other.vector, strict=True)]
        return solve_nonnegative(matrix, vector, reluctance)

    def state(self) -> dict[str, list[Any]]:
        """The sums, as JSON can hold them."""
        return {"matrix": self.matrix, "vector": self.vector}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], features: int) -> Self:
        """The sums of a `state`; raises `ValueError` if they are not `features` finite numbers in each row."""
        equations = cls(features)
        equations.vector = _numbers(state["vector"], features)
        if len(state["matrix"]) != features:
            raise ValueError(f"expected {features} rows, got {len(state['matrix'])}")
        equations.matrix = [_numbers(row, features) for row in state["matrix"]]
        if any(equations.matrix[i][i] < 0 for i in range(features)):
            raise ValueError("a sum of squares is negative")
        return equations


def _numbers(values: Sequence[Any], count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected {count} finite numbers, got {values!r}")
    return numbers
