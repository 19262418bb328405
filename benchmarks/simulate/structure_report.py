"""Shows the regret of the planner on each cost structure: a table and a plot."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from modalkit.benchmarks.simulate.regret import ALL_ITEMS, CALLERS, FIRST_ITEMS, Regret

TARGETS = {"first": 0.8, "all": 0.95}


def print_regrets(regrets: Sequence[Regret], console: Console) -> None:
    """A line for each structure and mix of sizes, with a mark where a target is missed."""
    table = Table(box=box.SIMPLE, title="Throughput from a cold start, as a share of the best fixed batch size")
    for column in ("structure", "sizes"):
        table.add_column(column)
    for column in (f"{FIRST_ITEMS} items", f"{ALL_ITEMS} items", f"{CALLERS} callers", "mean wait", "batches"):
        table.add_column(column, justify="right")
    for regret in regrets:
        table.add_row(
            regret.structure,
            regret.mix,
            _share(regret.first, TARGETS["first"]),
            _share(regret.all, TARGETS["all"]),
            f"{regret.callers:.2f}",
            f"{regret.waiting:.2f}",
            str(regret.batches),
        )
    console.print(table)
    missed = sum(regret.first < TARGETS["first"] or regret.all < TARGETS["all"] for regret in regrets)
    console.print(f"{missed} of {len(regrets)} miss a target (>= {TARGETS['first']}, >= {TARGETS['all']}).")


def draw_regrets(regrets: Sequence[Regret], file: Path) -> None:
    """Draw the shares of the two backlogs into an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.22 * len(regrets) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(regrets))
    axes.barh([place - 0.2 for place in places], [r.first for r in regrets], 0.4, label=f"first {FIRST_ITEMS} items")
    axes.barh([place + 0.2 for place in places], [r.all for r in regrets], 0.4, label=f"{ALL_ITEMS} items")
    axes.set_yticks(list(places), [f"{r.structure}; {r.mix}" for r in regrets], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(TARGETS["all"], linewidth=0.7)
    axes.axvline(TARGETS["first"], linewidth=0.7, linestyle="--")
    axes.set_xlabel("throughput as a share of the best fixed batch size")
    axes.legend(loc="lower left")
    figure.savefig(file, dpi=110)


def _share(value: float, target: float) -> str:
    return f"{value:.2f}" if value >= target else f"{value:.2f} !"
