"""Compares results with older ones: a verdict for each figure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modalkit.benchmarks.bench.results import MAX_FAILED_SHARE, failed_share, name_of

LOWER_IS_BETTER = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "delivery_p50_ms", "delivery_p99_ms", "cost_per_million")
HIGHER_IS_BETTER = ("items_per_s", "delivered_per_s", "accuracy")
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure beside the older one."""

    what: str
    """The load, with the engines where they differ."""
    figure: str
    before: float
    now: float
    verdict: str
    """``better``, ``worse`` or ``same``: within the tolerance, or within both confidence intervals."""

    @property
    def ratio(self) -> float:
        """Now by before."""
        return self.now / self.before if self.before else float("inf")


def compared(now: Mapping[str, Any], before: Mapping[str, Any], tolerance: float = TOLERANCE) -> list[Verdict]:
    """The verdicts of all loads that both documents have."""
    return list(_verdicts(now, before, tolerance))


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that differs and is not what is compared: then the verdicts tell little."""
    facts: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "another target:": lambda document: document["target"],
        "another machine:": lambda document: f"{document['machine']['cpu']}, {document['machine']['cores']} cores",
        "other items:": lambda document: document["settings"].get("items"),
        "another price per hour:": lambda document: document["settings"].get("price_per_hour"),
    }
    found = ((what, fact(now), fact(before)) for what, fact in facts.items())
    return [
        f"The older results are of {what} {then}; here {here}."
        for what, here, then in found
        if here != then and None not in (here, then)
    ]


def _verdicts(now: Mapping[str, Any], before: Mapping[str, Any], tolerance: float) -> Iterator[Verdict]:
    old_cells = {name_of(cell): cell for cell in before["cells"]}
    for cell in now["cells"]:
        old = old_cells.get(name_of(cell))
        if old is None:
            continue
        what = name_of(cell) + _change(_engine(cell), _engine(old))
        for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
            new_figure, old_figure = _figure(cell, name), _figure(old, name)
            if new_figure and old_figure:
                verdict = verdict_of(new_figure, old_figure, tolerance, higher=name in HIGHER_IS_BETTER)
                yield Verdict(what, name, old_figure["mean"], new_figure["mean"], verdict)
        before_share, share = failed_share(old), failed_share(cell)
        if before_share or share:
            is_same = abs(share - before_share) <= MAX_FAILED_SHARE
            verdict = "same" if is_same else "worse" if share > before_share else "better"
            yield Verdict(what, "share of items that failed", before_share, share, verdict)
    old_searches = {_search_name(search): search for search in before["searches"]}
    for search in now["searches"]:
        other = old_searches.get(_search_name(search))
        if other is None:
            continue
        rate, old_rate = (found["items_per_s"] or 0.0 for found in (search, other))  # None: no rate keeps the limit
        if rate or old_rate:
            verdict = verdict_of({"mean": rate}, {"mean": old_rate}, tolerance, higher=True)
            what = _search_name(search) + _change(search.get("engine"), other.get("engine"))
            yield Verdict(what, "items_per_s", old_rate, rate, verdict)


def verdict_of(now: Mapping[str, Any], before: Mapping[str, Any], tolerance: float, *, higher: bool) -> str:
    """The verdict of one figure, which may have a confidence interval."""
    if abs(now["mean"] - before["mean"]) <= tolerance * abs(before["mean"]) or overlap(now, before):
        return "same"
    return "better" if (now["mean"] > before["mean"]) is higher else "worse"


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two confidence intervals overlap; False where one is not known."""
    if one.get("low") is None or other.get("low") is None:
        return False
    return bool(one["low"] <= other["high"] and other["low"] <= one["high"])


def _figure(cell: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    if name in ("accuracy", "cost_per_million"):
        return None if cell[name] is None else {"mean": cell[name]}
    found: Mapping[str, Any] | None = cell["figures"].get(name)
    return found


def _engine(cell: Mapping[str, Any]) -> str | None:
    return (cell["server"] or {}).get("engine")


def _change(now: str | None, before: str | None) -> str:
    """The engines, where they differ; nothing where one is not known."""
    return f" ({now}, before {before})" if now and before and now != before else ""


def _search_name(search: Mapping[str, Any]) -> str:
    limit = f", p99 below {search['p99_limit_ms']:g} ms" if "p99_limit_ms" in search else ""
    variant = "".join(f", {key} {value}" for key, value in search["variant"].items())
    return f"{search['search']}{limit}{variant}"
