"""Chooses the limits of a scheduler from measured batches and a cost model, by pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from modalkit.batching import BatchPolicy, CostModel
from modalkit.batching.calibration import Measurement
from modalkit.service.tuning import TuningError

MIN_BATCH_S = 1e-9  # in place of 0, which a coarse clock measures
MAX_WAIT_SHARE = 0.1  # of the objective
ENOUGH = 0.98  # of the best throughput; the rest is within the noise of measuring
UNSEEN = 0.95  # of the throughput that a count between two measured ones may reach


@dataclass(frozen=True, slots=True)
class ChosenLimits:
    """What was chosen: `values` by key of ``batch_config``, whole numbers without a fraction.

    A key that stays as it is configured has no value. `reasons` has a line for each key.
    """

    values: dict[str, int | float]
    reasons: dict[str, str]


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
    lines = _by_size(measurements, configured)
    batch_s: float | None = None
    tokens = configured.max_batch_tokens
    values: dict[str, int | float] = {}
    reasons: dict[str, str] = {}
    if objective_s is None:
        reasons["max_batch_seconds"] = reasons["wait_ms"] = "as configured: it follows from --p99-ms"
    else:
        _require_room_for_largest(lines, objective_s, beside_s)
        wait_ms, reasons["wait_ms"] = _wait_ms(lines, model, objective_s, beside_s)
        batch_s = _rounded_down((objective_s - beside_s - wait_ms / 1000) / 2)
        values |= {"wait_ms": wait_ms, "max_batch_seconds": batch_s}
        reasons["max_batch_seconds"] = (
            f"a request may wait for one batch{f' and {wait_ms:g} ms' if wait_ms else ''}, and runs in the next: "
            f"half of what {objective_s * 1000:g} ms leave, with {beside_s * 1000:.2g} ms for the rest"
        )
    reasons["max_batch_tokens"] = "as configured: memory was not what limited the batches that were measured"
    if too_large_tokens is not None:
        tokens = max(held for shape in measurements if (held := shape.count * shape.longest) < too_large_tokens)
        values["max_batch_tokens"] = tokens
        reasons["max_batch_tokens"] = f"the largest batch that fitted; one of {too_large_tokens} was out of memory"
    limits = replace(configured, max_batch_s=batch_s, max_batch_tokens=tokens)
    values["max_batch_size"], reasons["max_batch_size"] = _batch_size(_by_size(measurements, limits), model, limits)
    return ChosenLimits({key: value if value % 1 else int(value) for key, value in values.items()}, reasons)


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


def predicted_capacity(
    measurements: Sequence[Measurement], policy: BatchPolicy, load: float, max_in_flight: int = 1
) -> Capacity:
    """The capacity if all measured sizes are equally frequent and each runs in its best batch under `policy`.

    `max_in_flight` batches run at once, each in the measured time.

    It needs a queue in which every size fills batches of its own. The time of a batch with the largest allowed count,
    if it was not measured, is that of the next larger measured batch, if there is one.
    """
    lines = [line.runnable() for line in _by_size(measurements, policy)]
    rates = [max(count / seconds for count, seconds in shapes) for shapes in lines]
    return Capacity(
        items_per_s=max_in_flight * len(rates) / sum(1 / rate for rate in rates),
        batch_s=max(
            next(seconds for count, seconds in shapes if count / seconds >= load * rate)
            for shapes, rate in zip(lines, rates, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class _SizeEvidence:
    """Measured batches of requests of `size`: `shapes` holds counts, ascending, with the seconds of each batch.

    Limits allow at most `max_count` of them in a batch, which may take `max_s` seconds; a single request may take more.
    """

    size: int
    shapes: Sequence[tuple[int, float]]
    max_count: int
    max_s: float

    @property
    def alone_s(self) -> float:
        """The seconds of one request alone."""
        return self.shapes[0][1]

    def enough(self) -> int:
        """The smallest measured count that reaches 98 % of the best throughput of batches within `max_s`."""
        allowed = [(count, seconds) for count, seconds in self.shapes if count == 1 or seconds <= self.max_s]
        best = max(count / seconds for count, seconds in allowed)
        return next(count for count, seconds in allowed if count / seconds >= ENOUGH * best)

    def is_enough(self, limit: int) -> bool:
        """Whether the measurements show that allowed counts above `limit` add nearly no throughput.

        After a measured count, the time is assumed to grow at least as fast as before it. If it was constant and then
        rose (as with the tiles of a GPU), a count between the two may be much better than both.
        """
        best = max(count / seconds for count, seconds in self.shapes if count <= limit)
        before: tuple[int, float] | None = None
        for (count, seconds), (next_count, _) in zip(self.shapes, [*self.shapes[1:], (math.inf, 0.0)], strict=True):
            if count >= self.max_count or (count > 1 and seconds > self.max_s):
                return True
            if next_count > limit:
                growth_s = max(0.0, (seconds - before[1]) / (count - before[0])) if before else 0.0
                largest = min(next_count - 1, self.max_count)
                if growth_s:
                    largest = min(largest, count + (self.max_s - seconds) / growth_s)
                if next_count == math.inf or UNSEEN * largest / (seconds + growth_s * (largest - count)) > best:
                    return False
            before = count, seconds
        return True

    def fits_the_costs(self, model: CostModel, limit: int) -> bool:
        """Whether `limit` is also enough by the fitted costs, in which a single wrong measurement counts less."""
        counts = range(1, self.max_count + 1)
        seconds = {count: model.predict_s(count, self.size, count * self.size) for count in counts}
        rates = {count: count / seconds[count] for count in counts if count == 1 or seconds[count] <= self.max_s}
        return UNSEEN * max(rates.values()) <= max(rate for count, rate in rates.items() if count <= limit)

    def runnable(self) -> list[tuple[int, float]]:
        """Allowed counts and their seconds: measured ones, and the largest with the seconds of the next larger one."""
        shapes = [(count, seconds) for count, seconds in self.shapes if count == 1 or seconds <= self.max_s]
        above = [(self.max_count, seconds) for count, seconds in shapes if count > self.max_count]
        return [shape for shape in shapes if shape[0] <= self.max_count] + above[:1]


def _require_room_for_largest(lines: Sequence[_SizeEvidence], objective_s: float, beside_s: float) -> None:
    needed_s = 2 * lines[-1].alone_s + beside_s
    if needed_s <= objective_s:
        return
    feasible = [line.size for line in lines if 2 * line.alone_s + beside_s <= objective_s]
    what = f"only sizes up to {feasible[-1]} can" if feasible else f"not even size {lines[0].size} can"
    raise TuningError(
        f"no limits reach --p99-ms {objective_s * 1000:g}: a request of size {lines[-1].size} alone takes "
        f"{lines[-1].alone_s * 1000:.3g} ms, and may have to wait for another one; {what}. Ask for --p99-ms "
        f"{math.ceil(needed_s * 1000)} or more, or limit what a request may hold"
    )


def _wait_ms(
    lines: Sequence[_SizeEvidence], model: CostModel, objective_s: float, beside_s: float
) -> tuple[float, str]:
    """Milliseconds, in tenths, that an idle worker may wait for a fuller batch; and the reason."""
    line = lines[len(lines) // 2]
    together_s = dict(line.shapes).get(2) or model.predict_s(2, line.size, 2 * line.size)
    worth_s = line.alone_s / 2 - (together_s - line.alone_s)
    ratio = f"two requests of size {line.size} cost {together_s / line.alone_s:.2f} times one"
    if worth_s <= 0:
        return 0.0, f"waiting does not pay: {ratio}, and it takes less than 1.5"
    room_s = objective_s - beside_s - 2 * lines[-1].alone_s
    wait_ms = math.floor(min(worth_s, objective_s * MAX_WAIT_SHARE, room_s) * 10_000) / 10
    if wait_ms <= 0:
        return 0.0, f"the objective leaves no time for it, though waiting may pay: {ratio}"
    return wait_ms, f"waiting pays where requests are frequent: {ratio}; at most a tenth of the objective"


def _batch_size(lines: Sequence[_SizeEvidence], model: CostModel, policy: BatchPolicy) -> tuple[int, str]:
    """The smallest count that is enough at every size, and the reason."""
    wanted, line = max(((line.enough(), line) for line in lines), key=lambda pair: pair[0])
    configured = policy.max_batch_size
    for other in lines if wanted < configured else ():
        if not other.is_enough(wanted):
            measured = other.shapes[-1][0]
            reason = f"between the counts measured at size {other.size}, a better one may lie"
            if measured < configured:
                reason = f"more than {measured} of size {other.size} were not measured, which lowers no limit"
            return configured, f"as configured: {reason}"
        if not other.fits_the_costs(model, wanted):
            return configured, f"as configured: by the fitted costs, larger batches of size {other.size} do pay"
    *_, (before, before_s), (largest, largest_s) = [(1, line.alone_s), *line.shapes]
    if wanted == largest > 1:
        gain = largest / largest_s / (before / before_s) - 1
        return wanted, f"the largest measured; over {before}, it still adds {gain:.0%} at size {line.size}"
    within = "" if policy.max_batch_s is None else " within max_batch_seconds"
    return (
        wanted,
        f"larger batches{within} add less than 2 % to the items/s at any size; size {line.size} needs so many",
    )


def _by_size(measurements: Sequence[Measurement], policy: BatchPolicy) -> list[_SizeEvidence]:
    """The measurements at each size that was measured alone, ascending, with what `policy` allows there."""
    sizes = lone_sizes(measurements)
    if not sizes:
        raise TuningError("no request was measured alone, so there is nothing to choose limits by")
    shapes: dict[int, dict[int, float]] = {size: {} for size in sizes}
    for shape in measurements:
        shapes[nearest_size(sizes, shape.longest)][shape.count] = max(shape.seconds, MIN_BATCH_S)
    max_tokens, max_s = policy.max_batch_tokens or math.inf, policy.max_batch_s or math.inf
    return [
        _SizeEvidence(size, sorted(seconds.items()), int(min(policy.max_batch_size, max(1, max_tokens / size))), max_s)
        for size, seconds in shapes.items()
    ]


def _rounded_down(seconds: float) -> float:
    """Four digits of a positive number, so that it is readable in a file."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 3)
    return round(math.floor(seconds / step) * step, 9)
