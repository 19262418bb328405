"""Chooses the limits of a scheduler from measured batches and a cost model, by pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modalkit.batching import BatchPolicy, CostModel
from modalkit.batching.calibration import Measurement
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.evidence import UNSEEN, Bounds, SizeEvidence

MIN_BATCH_S = 1e-9  # in place of 0, which a coarse clock measures
MAX_WAIT_SHARE = 0.1  # of the objective


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLimits:
    """Values for keys of ``batch_config``; None leaves a key as it is configured. `reasons` has a line for each key."""

    max_batch_size: int
    wait_ms: float | None
    max_batch_tokens: int | None
    max_batch_seconds: float | None
    reasons: Mapping[str, str]

    def values(self) -> dict[str, int | float]:
        """What was chosen, by key of ``batch_config``; whole numbers without a fraction."""
        chosen = {
            "max_batch_size": self.max_batch_size,
            "wait_ms": self.wait_ms,
            "max_batch_tokens": self.max_batch_tokens,
            "max_batch_seconds": self.max_batch_seconds,
        }
        return {key: value if value % 1 else int(value) for key, value in chosen.items() if value is not None}


def choose_limits(
    measurements: Sequence[Measurement],
    model: CostModel,
    objective_s: float | None = None,
    *,
    configured: BatchPolicy,
    beside_s: float = 0.0,
    too_large_tokens: int | None = None,
) -> ChosenLimits:
    """The limits that reach a p99 latency of `objective_s` seconds, or the best throughput where that is None.

    ``max_batch_seconds``: a request waits at most for the running batch and then ``wait_ms``, and runs in the next
    batch; everything else takes `beside_s`. So ``2 * max_batch_seconds + wait + beside_s`` must not exceed the
    objective. This is true while all waiting requests fit into the next batch; under more load the queue grows, and no
    limit of a batch helps.

    ``wait_ms``: 0, unless two requests of the middle size together take less than 1.5 times one alone, because else
    the planner never waits (`BatchPlanner`). Then the longest time for which waiting saves time: at most a tenth of
    the objective, and short enough that the largest request alone stays within the objective.

    ``max_batch_size``: the smallest measured count that reaches 98 % of the best measured throughput at every measured
    size, among batches within ``max_batch_seconds``. It is lower than `configured` only if the larger counts were
    measured or exceed other limits, no count between measured ones can be more than 5 % better, and `model` agrees.
    The scheduler may form smaller batches, where these are cheaper.

    ``max_batch_tokens``: the largest batch that fitted into memory, padding included, if one of `too_large_tokens` did
    not fit.

    Raises `TuningError` when the largest measured request alone takes longer than ``max_batch_seconds`` would be.
    """
    costs = _Costs(measurements, model)
    batch_s, wait_s, reasons = math.inf, 0.0, dict[str, str]()
    if objective_s is None:
        reasons["max_batch_seconds"] = reasons["wait_ms"] = "as configured: it follows from --p99-ms"
    else:
        costs.require_room_for_largest(objective_s, beside_s)
        wait_s, reasons["wait_ms"] = costs.wait(objective_s, beside_s)
        batch_s = _rounded_down((objective_s - beside_s - wait_s) / 2)
        reasons["max_batch_seconds"] = (
            f"a request may wait for one batch{f' and {wait_s * 1000:g} ms' if wait_s else ''}, and runs in the next: "
            f"half of what {objective_s * 1000:g} ms leave, with {beside_s * 1000:.2g} ms for the rest"
        )
    tokens = None
    reasons["max_batch_tokens"] = "as configured: memory was not what limited the batches that were measured"
    if too_large_tokens is not None:
        tokens = max(_tokens(shape) for shape in measurements if _tokens(shape) < too_large_tokens)
        reasons["max_batch_tokens"] = f"the largest batch that fitted; one of {too_large_tokens} was out of memory"
    max_tokens = tokens or configured.max_batch_tokens or math.inf
    size, reasons["max_batch_size"] = costs.batch_size(Bounds(configured.max_batch_size, batch_s, max_tokens))
    return ChosenLimits(
        max_batch_size=size,
        wait_ms=None if objective_s is None else round(wait_s * 1000, 1),
        max_batch_tokens=tokens,
        max_batch_seconds=None if objective_s is None else batch_s,
        reasons=reasons,
    )


def lone_sizes(measurements: Sequence[Measurement]) -> list[int]:
    """The sizes of the requests that were measured alone, ascending."""
    return sorted({shape.longest for shape in measurements if shape.count == 1})


def nearest_size(sizes: Sequence[int], size: int) -> int:
    """The element of `sizes` whose ratio to `size` is nearest to 1."""
    return min(sizes, key=lambda other: abs(math.log(other / size)))


@dataclass(frozen=True, slots=True)
class Capacity:
    """The throughput of a worker whose queue is never empty, and the seconds of a batch at a share of that load."""

    items_per_s: float
    batch_s: float


def predicted_capacity(measurements: Sequence[Measurement], policy: BatchPolicy, load: float) -> Capacity:
    """The capacity if all measured sizes are equally frequent and each runs in its best batch under `policy`.

    It needs a queue in which every size fills batches of its own. The time of a batch with the largest allowed count,
    if it was not measured, is that of the next larger measured batch, if there is one.
    """
    bounds = Bounds(policy.max_batch_size, policy.max_batch_s or math.inf, policy.max_batch_tokens or math.inf)
    rates = {line: line.best(bounds) for line in _by_size(measurements)}
    return Capacity(
        items_per_s=len(rates) / sum(1 / rate for rate in rates.values()),
        batch_s=max(line.seconds_at(load * rate, bounds) for line, rate in rates.items()),
    )


class _Costs:
    """Seconds of batches of the measured sizes: as measured, else as predicted by the model."""

    def __init__(self, measurements: Sequence[Measurement], model: CostModel) -> None:
        self._lines = _by_size(measurements)
        self.sizes = [line.size for line in self._lines]
        self._measured = {(line.size, count): seconds for line in self._lines for count, seconds in line.shapes}
        self._model = model

    def seconds(self, count: int, size: int) -> float:
        measured_s = self._measured.get((size, count))
        return self._model.predict_s(count, size, count * size) if measured_s is None else measured_s

    def require_room_for_largest(self, objective_s: float, beside_s: float) -> None:
        largest = self.sizes[-1]
        lone_s = self.seconds(1, largest)
        needed_s = 2 * lone_s + beside_s
        if needed_s <= objective_s:
            return
        feasible = [size for size in self.sizes if 2 * self.seconds(1, size) + beside_s <= objective_s]
        what = f"only sizes up to {feasible[-1]} can" if feasible else f"not even size {self.sizes[0]} can"
        raise TuningError(
            f"no limits reach --p99-ms {objective_s * 1000:g}: a request of size {largest} alone takes "
            f"{lone_s * 1000:.3g} ms, and may have to wait for another one; {what}. Ask for --p99-ms "
            f"{math.ceil(needed_s * 1000)} or more, or limit what a request may hold"
        )

    def wait(self, objective_s: float, beside_s: float) -> tuple[float, str]:
        """Seconds that an idle worker may wait for a fuller batch, in tenths of a millisecond; and the reason."""
        size = self.sizes[len(self.sizes) // 2]
        alone_s, together_s = self.seconds(1, size), self.seconds(2, size)
        worth_s = alone_s / 2 - (together_s - alone_s)
        ratio = f"two requests of size {size} cost {together_s / alone_s:.2f} times one"
        if worth_s <= 0:
            return 0.0, f"waiting does not pay: {ratio}, and it takes less than 1.5"
        room_s = objective_s - beside_s - 2 * self.seconds(1, self.sizes[-1])
        wait_s = math.floor(min(worth_s, objective_s * MAX_WAIT_SHARE, room_s) * 10_000) / 10_000
        if wait_s <= 0:
            return 0.0, f"the objective leaves no time for it, though waiting may pay: {ratio}"
        return wait_s, f"waiting pays where requests are frequent: {ratio}; at most a tenth of the objective"

    def batch_size(self, bounds: Bounds) -> tuple[int, str]:
        """The smallest count that is enough at every size, and the reason; `bounds` has the configured one."""
        enough = {line: line.enough(bounds.max_s) for line in self._lines}
        line = max(self._lines, key=enough.__getitem__)
        wanted, configured = enough[line], bounds.max_count
        if wanted < configured:
            for other in self._lines:
                if not other.is_enough(wanted, bounds):
                    return configured, other.why_not_lower(configured)
                if not self._fits_the_costs(other, wanted, bounds):
                    return configured, f"as configured: by the fitted costs, larger batches of size {other.size} do pay"
        return wanted, self._why(line, wanted, bounds.max_s)

    def _fits_the_costs(self, line: SizeEvidence, limit: int, bounds: Bounds) -> bool:
        """Whether `limit` is also enough by the fitted costs, in which a single wrong measurement counts less."""
        top = bounds.largest_count(line.size)
        seconds = {count: self._model.predict_s(count, line.size, count * line.size) for count in range(1, top + 1)}
        rates = {count: count / seconds[count] for count in seconds if count == 1 or seconds[count] <= bounds.max_s}
        return UNSEEN * max(rates.values()) <= max(rate for count, rate in rates.items() if count <= limit)

    def _why(self, line: SizeEvidence, chosen: int, max_s: float) -> str:
        *_, (before, before_s), (largest, largest_s) = [(1, line.shapes[0][1]), *line.shapes]
        if chosen == largest > 1:
            gain = largest / largest_s / (before / before_s) - 1
            return f"the largest measured; over {before}, it still adds {gain:.0%} at size {line.size}"
        within = "" if max_s == math.inf else " within max_batch_seconds"
        return f"larger batches{within} add less than 2 % to the items/s at any size; size {line.size} needs so many"


def _tokens(shape: Measurement) -> int:
    return shape.count * shape.longest


def _by_size(measurements: Sequence[Measurement]) -> list[SizeEvidence]:
    """The measurements at each size that was measured alone, ascending."""
    sizes = lone_sizes(measurements)
    if not sizes:
        raise TuningError("no request was measured alone, so there is nothing to choose limits by")
    shapes: dict[int, dict[int, float]] = {size: {} for size in sizes}
    for shape in measurements:
        shapes[nearest_size(sizes, shape.longest)][shape.count] = max(shape.seconds, MIN_BATCH_S)
    return [SizeEvidence(size, tuple(sorted(seconds.items()))) for size, seconds in shapes.items()]


def _rounded_down(seconds: float) -> float:
    """Rounded down to four digits, so that the number in the file is readable."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 3)
    return round(math.floor(seconds / step) * step, 9)
