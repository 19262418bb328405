"""What guilty items cost: the real scheduler beside the best nested group-testing plan, which knows how many there are.

Runs are counted, and item-runs, which are the items of all runs together. The plan is that of Sobel and Groll (1959)
for an endless stream, with groups of at most so many: of all plans that only ever run a part of a group that is known
to hold a guilty item, or a new group, it has the fewest runs. It infers the guilt of the last item of such a group,
which the scheduler proves by a run.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import anyio
from rich.console import Console
from rich.table import Table

from modalkit.batching import BatchPolicy, BatchScheduler, Failure, PaddedCostModel, Success

SHARES = (0.0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)
MOST_IN_A_BATCH = (8, 32, 256)
ITEMS = 2000


@dataclass(slots=True)
class Effort:
    """How much ran, and what became of the items."""

    runs: int = 0
    item_runs: int = 0
    innocent_lost: int = 0
    """Innocent items that got an error."""
    systemic: int = 0
    """Items that were given up because nothing succeeded any more."""

    def add(self, count: int) -> None:
        """Count a run of `count` items."""
        self.runs += 1
        self.item_runs += count


def stream(share: float, seed: int, items: int = ITEMS) -> list[bool]:
    """For each item whether it is guilty."""
    chance = random.Random(seed)  # noqa: S311  # a simulation
    return [chance.random() < share for _ in range(items)]


class PoisonedError(Exception):
    """Raised for a batch with a guilty item in it."""


async def scheduler_effort(guilty: Sequence[bool], most: int, runs: list[list[int]] | None = None) -> Effort:
    """Give all items to a new scheduler at once; `runs` gets the items of each run."""
    effort = Effort()

    async def run(items: list[int]) -> list[int]:
        effort.add(len(items))
        if runs is not None:
            runs.append(items)
        if any(guilty[item] for item in items):
            raise PoisonedError
        return items

    policy = BatchPolicy(max_batch_size=most, max_queue_items=len(guilty))
    async with BatchScheduler(run, policy=policy, cost_model=PaddedCostModel()) as scheduler:
        outcomes = await scheduler.submit_many(range(len(guilty)))
    for item, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            effort.systemic += outcome.is_systemic
            effort.innocent_lost += not guilty[item]
        elif outcome != Success(item) or guilty[item]:
            raise AssertionError(f"item {item} got {outcome}")
    return effort


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """How many items to run next: of new ones, and of a group of n that is known to hold a guilty one, ``of[n]``."""

    new: int
    of: Sequence[int]

    def effort(self, guilty: Sequence[bool]) -> Effort:
        """Follow the plan along a stream."""
        effort, start = Effort(), 0
        while start < len(guilty):
            suspects, count = 0, min(self.new, len(guilty) - start)
            while True:
                if suspects == 1:  # guilty, without a run
                    start += 1
                    break
                effort.add(count)
                if any(guilty[start : start + count]):
                    suspects = count
                else:
                    start += count
                    suspects = suspects - count if suspects else 0
                    if not suspects:
                        break
                count = self.of[suspects]
        return effort


def best_nested_plan(share: float, most: int) -> NestedPlan:
    """The plan with the fewest runs for an item, on average: its price, at which a group is worth what it costs."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        price = (low + high) / 2
        if _best_group(share, most, price)[0] < 0:
            high = price
        else:
            low = price
    return _best_group(share, most, high)[1]


def _best_group(share: float, most: int, price: float) -> tuple[float, NestedPlan]:
    """The least runs, less `price` for each item that is told apart, of one group until nothing is known again."""
    passes = [(1 - share) ** count for count in range(most + 1)]
    worth, choice = [0.0, -price], [0, 1]  # of a group that is known to hold a guilty item
    for suspects in range(2, most + 1):
        total = 1 - passes[suspects]
        value, part = min(
            (
                1
                + (passes[part] - passes[suspects]) / total * (worth[suspects - part] - price * part)
                + (1 - passes[part]) / total * worth[part],
                part,
            )
            for part in range(1, suspects)
        )
        worth.append(value)
        choice.append(part)
    value, new = min(
        (1 - passes[count] * price * count + (1 - passes[count]) * worth[count], count) for count in range(1, most + 1)
    )
    return value, NestedPlan(new, choice)


def poison_table(shares: Sequence[float], batch_sizes: Sequence[int], items: int, seeds: int, console: Console) -> None:
    """Print what each share of guilty items costs, as the mean of several streams."""
    table = Table("guilty", "batch", "runs", "best", "ratio", "item-runs", "best", "ratio", "innocent lost", "given up")
    for share in shares:
        for most in batch_sizes:
            ours, best = [], []
            for seed in range(seeds):
                guilty = stream(share, seed, items)
                ours.append(anyio.run(partial(scheduler_effort, guilty, most)))
                # Where all items are innocent, or none is, there is nothing to plan.
                plan = best_nested_plan(share, most) if 0 < share < 1 else NestedPlan(most if share == 0 else 1, [1, 1])
                best.append(plan.effort(guilty))
            figures = [
                (sum(effort.runs for effort in efforts) / seeds, sum(effort.item_runs for effort in efforts) / seeds)
                for efforts in (ours, best)
            ]
            (runs, item_runs), (best_runs, best_item_runs) = figures
            lost = sum(effort.innocent_lost for effort in ours) / seeds
            table.add_row(
                f"{share:.3g}",
                f"{most}",
                *(f"{runs:.0f}", f"{best_runs:.0f}", f"{runs / best_runs:.2f}"),
                *(f"{item_runs:.0f}", f"{best_item_runs:.0f}", f"{item_runs / best_item_runs:.2f}"),
                f"{lost:g}",
                f"{sum(effort.systemic for effort in ours) / seeds:g}",
            )
    console.print(table)
