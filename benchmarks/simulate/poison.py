"""The cost of failing items: the real scheduler beside the best nested group-testing plan that knows their share.

Runs are counted, and item-runs, the sum of the items of all runs. The plan is that of Sobel and Groll (1959) for an
endless stream with groups of limited size. A nested plan runs either a part of a failing group or a new group; of all
nested plans this one needs the fewest runs. It infers that the last item of a failing group is failing, while the
scheduler proves it by a run.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import anyio
from rich.console import Console

from modalkit.batching import BatchPolicy, BatchScheduler, Failure, PaddedCostModel, Success
from modalkit.benchmarks.tables import terminal_table

SHARES = (0.0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)
BATCH_SIZES = (8, 32, 256)
ITEMS = 2000


@dataclass(slots=True)
class Effort:
    """How much ran, and how the items ended."""

    runs: int = 0
    item_runs: int = 0
    wrongly_failed: int = 0
    """Items that are not failing but got an error."""
    systemic: int = 0
    """Items whose error was systemic."""

    def add(self, count: int) -> None:
        """Count a run of `count` items."""
        self.runs += 1
        self.item_runs += count


def stream(share: float, seed: int, items: int = ITEMS) -> list[bool]:
    """For each item, whether it is failing."""
    chance = random.Random(seed)  # noqa: S311  # a simulation
    return [chance.random() < share for _ in range(items)]


class PoisonedError(Exception):
    """Raised for a batch with a failing item."""


async def scheduler_effort(failing: Sequence[bool], most: int, runs: list[list[int]] | None = None) -> Effort:
    """Give all items to a new scheduler at once; `runs` gets the items of each run."""
    effort = Effort()

    async def run(items: list[int]) -> list[int]:
        effort.add(len(items))
        if runs is not None:
            runs.append(items)
        if any(failing[item] for item in items):
            raise PoisonedError
        return items

    policy = BatchPolicy(max_batch_size=most, max_queue_items=len(failing))
    async with BatchScheduler(run, policy=policy, cost_model=PaddedCostModel()) as scheduler:
        outcomes = await scheduler.submit_many(range(len(failing)))
    for item, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            effort.systemic += outcome.is_systemic
            effort.wrongly_failed += not failing[item]
        elif outcome != Success(item) or failing[item]:
            raise AssertionError(f"item {item} got {outcome}")
    return effort


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """How many items to run next: `new` ones if there is no failing group, or ``of[n]`` of a failing group of n."""

    new: int
    of: Sequence[int]

    def effort(self, failing: Sequence[bool]) -> Effort:
        """Follow the plan along a stream."""
        effort, start = Effort(), 0
        while start < len(failing):
            group, count = 0, min(self.new, len(failing) - start)
            while True:
                if group == 1:  # failing, by inference
                    start += 1
                    break
                effort.add(count)
                if any(failing[start : start + count]):
                    group = count
                else:
                    start += count
                    group = group - count if group else 0
                    if not group:
                        break
                count = self.of[group]
        return effort


def best_nested_plan(share: float, most: int) -> NestedPlan:
    """The plan with the fewest runs per item on average, found by bisection of that number, the price of an item."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        price = (low + high) / 2
        if _best_group(share, most, price)[0] < 0:
            high = price
        else:
            low = price
    return _best_group(share, most, high)[1]


def _best_group(share: float, most: int, price: float) -> tuple[float, NestedPlan]:
    """The fewest expected runs minus `price` per resolved item, from a new group until nothing is known again."""
    passes = [(1 - share) ** count for count in range(most + 1)]
    worth, choice = [0.0, -price], [0, 1]  # of a failing group
    for group in range(2, most + 1):
        total = 1 - passes[group]
        value, part = min(
            (
                1
                + (passes[part] - passes[group]) / total * (worth[group - part] - price * part)
                + (1 - passes[part]) / total * worth[part],
                part,
            )
            for part in range(1, group)
        )
        worth.append(value)
        choice.append(part)
    value, new = min(
        (1 - passes[count] * price * count + (1 - passes[count]) * worth[count], count) for count in range(1, most + 1)
    )
    return value, NestedPlan(new, choice)


def poison_table(shares: Sequence[float], batch_sizes: Sequence[int], items: int, seeds: int, console: Console) -> None:
    """Print the cost of each share of failing items, as the mean of several streams."""
    rows: list[list[str]] = []
    for share in shares:
        for most in batch_sizes:
            ours, best = [], []
            for seed in range(seeds):
                failing = stream(share, seed, items)
                ours.append(anyio.run(partial(scheduler_effort, failing, most)))
                # If all items are failing, or none is, there is nothing to plan.
                plan = best_nested_plan(share, most) if 0 < share < 1 else NestedPlan(most if share == 0 else 1, [1, 1])
                best.append(plan.effort(failing))
            figures = [
                (sum(effort.runs for effort in efforts) / seeds, sum(effort.item_runs for effort in efforts) / seeds)
                for efforts in (ours, best)
            ]
            (runs, item_runs), (best_runs, best_item_runs) = figures
            lost = sum(effort.wrongly_failed for effort in ours) / seeds
            row = [f"{share:.3g}", f"{most}", f"{runs:.0f}", f"{best_runs:.0f}", f"{runs / best_runs:.2f}"]
            row += [f"{item_runs:.0f}", f"{best_item_runs:.0f}", f"{item_runs / best_item_runs:.2f}"]
            rows.append([*row, f"{lost:g}", f"{sum(effort.systemic for effort in ours) / seeds:g}"])
    columns = ("failing", "batch", "runs", "best", "ratio", "item-runs", "best", "ratio", "wrongly failed", "systemic")
    console.print(terminal_table(columns, rows))
