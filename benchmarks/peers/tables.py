"""The tables of a run, from its document."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modalkit.benchmarks.peers.contenders import CONTENDERS, OURS, UNBATCHED, contender
from modalkit.benchmarks.peers.jobs import JOBS, ROUTES
from modalkit.benchmarks.peers.measures import LOADS
from modalkit.benchmarks.peers.run import FEW, MANY, RIVAL_LOAD, steps_of

NOTHING = "-"
DOUBT = "(!)"
DOCUMENTED = "others as their documentation recommends"
BEST = "others at the best of a sweep"
KINDS = {"float32": "float32", "types": "the best engines and types"}
"""The kinds of steps whose latencies are compared at the same rate, as they are told."""
Step = Mapping[str, Any]
Steps = Mapping[str, Step]


@dataclass(frozen=True, slots=True)
class Table:
    """A title, what one must know to read it, and cells as text."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of ours beside that of others, and what it must reach."""

    what: str
    value: float
    limit: float
    is_least: bool
    detail: str

    @property
    def is_met(self) -> bool:
        """Whether it is reached."""
        return self.value >= self.limit if self.is_least else self.value <= self.limit


def tables_of(document: Mapping[str, Any]) -> list[Table]:
    """All tables for which something was measured."""
    steps: Steps = document["steps"]
    targets = targets_of(steps)
    found = [_targets(targets), _float32(steps), _latencies(steps), _best_types(steps), _documented(steps)]
    found += [_poison(steps), _killed(steps), _overhead(document), _batches(document)]
    return [_marked(table) for table in found if table.rows]


def _marked(table: Table) -> Table:
    """The table, which says what its marks are where it has one."""
    has_mark = any(DOUBT in cell for row in table.rows for cell in row)
    return (
        replace(table, note=f"{table.note} {DOUBT}: the load generator was the limit.".strip()) if has_mark else table
    )


def targets_of(steps: Steps) -> list[Target]:
    """What was set for modalkit beside these servers, and what was measured."""
    targets: list[Target] = []

    def add(
        what: str,
        values: Mapping[str, float],
        limit: float,
        *,
        is_least: bool = True,
        beside: str = "",
        detail: str = "",
    ) -> None:
        """Ours beside the best of the others."""
        rivals = {name: value for name, value in values.items() if name != OURS and value}
        if OURS in values and rivals:
            best = (max if is_least else min)(rivals, key=rivals.__getitem__)
            what = f"{what}: ours / {beside}"
            targets.append(Target(what, values[OURS] / rivals[best], limit, is_least, detail or _title(best)))

    names = [one.name for one in CONTENDERS]
    rates, documented = rates_of(steps), documented_rates_of(steps)
    types = {name: per_s for name in names if (per_s := _types_rate(steps, name)) is not None}
    best, leanest = "the best batching peer", "the leanest peer"
    for told, found, limit in (
        (f"float32, {DOCUMENTED}", documented | {OURS: rates[OURS]} if OURS in rates else {}, 2.6),
        (f"float32, {BEST}", rates, 2.6),
        (KINDS["types"], types, 3.0),
    ):
        what = f"items/s, {FEW} clients, {told}"
        add(what, {name: per_s for name, per_s in found.items() if name != UNBATCHED}, limit, beside=best)
        unbatched = {name: per_s for name, per_s in found.items() if name in (OURS, UNBATCHED)}
        add(what, unbatched, 2.0, beside="FastAPI without batching")
    for kind, told in KINDS.items():
        p99 = _rival_p99(steps, kind)
        both = ", ".join(f"{'ours' if name == OURS else _title(name) + ':'} {ms:.0f} ms" for name, ms in p99.items())
        what = f"p99 at {RIVAL_LOAD:.0%} of {best}'s capacity, {told}"
        add(what, p99, 0.5, is_least=False, beside="that peer", detail=both)
    measured = {name: step for name in names if (step := steps.get(f"float32/{name}", {})).get("idle")}
    latency = {name: step["idle"]["p50_ms"] for name, step in measured.items() if step["idle"]["p50_ms"]}
    memory = {name: step["memory_mib"] for name, step in measured.items()}
    add("median latency of one client", latency, 1.1, is_least=False, beside=leanest)
    add("memory under load", memory, 1.1, is_least=False, beside=leanest)
    return targets


def _targets(targets: Sequence[Target]) -> Table:
    rows = [
        [
            target.what,
            f"{target.value:.2f}",
            f"{'≥' if target.is_least else '≤'} {target.limit:g}",
            "met" if target.is_met else "**missed**",
            target.detail,
        ]
        for target in targets
    ]
    return Table("What modalkit must reach", "", ["figure", "measured", "target", "", "beside"], rows)


def _float32(steps: Steps) -> Table:
    rows = []
    for name, step in _each(steps, "float32"):
        rows.append(
            [
                _title(name),
                step["told"] if name != OURS else "its defaults",
                _both(steps, name, FEW),
                _both(steps, name, MANY),
                _milliseconds(step["idle"]),
                f"{step['memory_mib']:,.0f}",
                f"{step['started_in_s']:.1f}",
                NOTHING if (share := step["idle"]["accuracy"]) is None else f"{share:.1%}",
                _errors(step),
            ]
        )
    return Table(
        "float32, each at the best of a small sweep",
        f"items/s: with {FEW} clients both rounds, the second in reverse order. One client: p50 / p99. Memory: "
        "resident, of all processes, after the load. Start: until the first answer. Same labels: share of answers with "
        "the label of the pipeline in float32.",
        [
            "server",
            "settings",
            f"items/s, {FEW} clients",
            f"items/s, {MANY} clients",
            "one client, ms",
            "memory, MiB",
            "start, s",
            "same labels",
            "errors",
        ],
        rows,
    )


def _latencies(steps: Steps) -> Table:
    rows = [
        [_title(name), *(f"{step[key]['rate']:.0f}/s: {_milliseconds(step[key])}" for key in _load_keys())]
        for name, step in _each(steps, "float32")
    ]
    rival = _rival_p99(steps, "float32")
    note = "Requests arrive at random; rate, and p50 / p99 in ms, counted from when a request was due."
    if rival:
        parts = ", ".join(f"{_title(name)} {p99:.0f} ms" for name, p99 in rival.items())
        note += f" At {RIVAL_LOAD:.0%} of the best batching peer's capacity, p99: {parts}."
    columns = ["server", *(f"{share:.0%} of its capacity" for share in LOADS)]
    return Table("Latency under load, float32", note, columns, rows)


def _best_types(steps: Steps) -> Table:
    rows = []
    for one in CONTENDERS:
        if tried := _types_steps(steps, one.name):
            best = max(tried, key=lambda step: float(step[f"clients_{FEW}"]["per_s"]))
            settings = best["told"] if one.name != OURS else "its defaults"
            rows.append([one.title, settings, _per_s(best[f"clients_{FEW}"]), _errors(best)])
    return Table(
        "The best engines and number formats, each at the best of the same sweep",
        "All but Infinity run the same pipeline, which takes the fastest engine whose outputs are the same; Infinity "
        "has torch in bfloat16. Where float32 by torch is faster, that is told.",
        ["server", "settings", f"items/s, {FEW} clients", "errors"],
        rows,
    )


def _documented(steps: Steps) -> Table:
    rows = [
        [
            _title(name),
            step["told"],
            contender(name).source,
            _per_s(step[f"clients_{FEW}"]),
            _per_s(step[f"clients_{MANY}"]),
            _errors(step),
        ]
        for name, step in _each(steps, "documented")
    ]
    columns = ["server", "settings", "from", f"items/s, {FEW} clients", f"items/s, {MANY} clients", "errors"]
    return Table("float32, at the settings that each one's documentation recommends", "", columns, rows)


def _poison(steps: Steps) -> Table:
    rows = []
    for name, step in _each(steps, "float32"):
        if (found := step.get("poisoned")) is None:
            rows.append([_title(name), "no item can fail: no code of yours runs in it", ""])
        else:
            rows.append([_title(name), f"{found['failed']:.1f}", str(found["failed_at_most"])])
    note = "32 requests at once, one of which makes the model raise. How many of the 31 others fail, too."
    return Table("A poisoned item", note, ["server", "others that fail, mean", "at most"], rows)


def _killed(steps: Steps) -> Table:
    rows = []
    for one in CONTENDERS:
        if (found := steps.get(f"killed/{one.name}")) and "accepted" in found:
            counts = [str(found[key]) for key in ("accepted", "done_before", "results_after")]
            rows.append([one.title, found["by"], *counts, str(found["accepted"] - found["results_after"])])
        elif one.name not in ROUTES and f"float32/{one.name}" in steps:
            rows.append([one.title, JOBLESS.get(one.name, "has no jobs"), *[NOTHING] * 4])
    note = f"{JOBS:,} jobs are accepted, all processes are killed (SIGKILL), and the server starts again."
    columns = ["server", "by", "accepted", "done before the kill", "results after it", "lost"]
    return Table("kill -9 with jobs accepted", note, columns, rows)


JOBLESS = {"ray": "only by Celery with a broker beside it: not measured"}


def _overhead(document: Mapping[str, Any]) -> Table:
    figures = document.get("libraries", {}).get("overhead", [])
    rows = [
        [figure["name"], f"{figure['median']:.3g} {figure['unit']}"]
        for figure in figures
        if figure["median"] is not None
    ]
    note = "1,000 callers of a function that does nothing, in one process; microseconds for each item."
    return Table("The scheduler beside other libraries", note, ["figure", "median"], rows)


def _batches(document: Mapping[str, Any]) -> Table:
    found = document.get("libraries", {}).get("batches", {})
    columns = list(next(iter(found.values()), {}))
    rows = [[rule, *(f"{value:.3g}" for value in figures.values())] for rule, figures in found.items()]
    note = (
        "In simulation, on two devices with measured costs: throughput as a share of the best offline loop, and p99 at "
        "70 % of that. modalkit learns the costs; razors-edge-batching-scheduler is given them exactly."
    )
    return Table("The quality of the batches", note, ["rule", *columns], rows)


# Parts of a step.


def _each(steps: Steps, kind: str) -> list[tuple[str, Step]]:
    found = ((one.name, steps.get(f"{kind}/{one.name}", {})) for one in CONTENDERS)
    return [(name, step) for name, step in found if f"clients_{FEW}" in step]


def _load_keys() -> list[str]:
    return [f"load_{share:.0%}" for share in LOADS]


def _title(name: str) -> str:
    return contender(name).title


def _rounds(steps: Steps, name: str, clients: int) -> list[Step]:
    found = (steps.get(f"{kind}/{name}", {}).get(f"clients_{clients}") for kind in ("float32", "again"))
    return [step for step in found if step]


def rate(steps: Steps, name: str) -> float | None:
    """Items per second at the best of the sweep in float32: the mean of both rounds."""
    rounds = _rounds(steps, name, FEW)
    return statistics.mean(step["per_s"] for step in rounds) if rounds else None


def rates_of(steps: Steps) -> dict[str, float]:
    """`rate` of each server that has one."""
    return {one.name: found for one in CONTENDERS if (found := rate(steps, one.name)) is not None}


def documented_rates_of(steps: Steps) -> dict[str, float]:
    """Items per second in float32 of each server, at the settings that its documentation recommends."""
    return {name: step[f"clients_{FEW}"]["per_s"] for name, step in _each(steps, "documented")}


def _types_steps(steps: Steps, name: str) -> list[Step]:
    """Those with the fastest engine and, because it may be that, those in float32; none without the former."""
    types = steps_of(steps, "types", name)
    return types and types + steps_of(steps, "float32", name) + steps_of(steps, "again", name)


def _types_rate(steps: Steps, name: str) -> float | None:
    return max((step[f"clients_{FEW}"]["per_s"] for step in _types_steps(steps, name)), default=None)


def _rival_p99(steps: Steps, kind: str) -> dict[str, float]:
    found = {
        one.name: [step["p99_ms"] for step in steps_of(steps, f"rival of {kind}", one.name) if step["p99_ms"]]
        for one in CONTENDERS
    }
    return {name: statistics.mean(values) for name, values in found.items() if values}


def _both(steps: Steps, name: str, clients: int) -> str:
    return ", ".join(map(_per_s, _rounds(steps, name, clients)))


def _per_s(step: Step) -> str:
    return f"{step['per_s']:.0f}{_doubt(step)}"


def _milliseconds(step: Step) -> str:
    return NOTHING if step["p50_ms"] is None else f"{step['p50_ms']:.1f} / {step['p99_ms']:.1f}{_doubt(step)}"


def _doubt(step: Step) -> str:
    """A mark where the load generator was the limit."""
    return f" {DOUBT}" if step.get("generator_was_the_limit") else ""


def _errors(step: Step) -> str:
    """What went wrong in any part of a step."""
    counts: dict[str, int] = {}
    for part in step.values():
        for reason, count in part.get("errors", {}).items() if isinstance(part, Mapping) else ():
            counts[reason] = counts.get(reason, 0) + count
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "none"
