"""Shows results: tables for the terminal and as Markdown, and the files of a run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic_core import to_json
from rich.console import Console

from modalkit.benchmarks.bench.compare import Verdict, overlap
from modalkit.benchmarks.bench.results import MAX_FAILED_SHARE, failed_share, name_of, variant_name
from modalkit.benchmarks.tables import Rows, markdown_table, terminal_table

NONE = "-"
"""In a cell without a value."""

MORE = {"items_per_s": "most items/s", "p99_ms": "lowest p99", "p50_ms": "lowest median"}


def number(value: float | None, unit: str = "") -> str:
    """A number with three digits, as in tables; a dash where there is none."""
    if value is None or value != value:  # NaN
        return NONE
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}{unit}"


def figure(cell: Mapping[str, Any], name: str) -> str:
    """A figure with half of its confidence interval."""
    found = cell["figures"].get(name)
    if not found:
        return NONE
    return number(found["mean"]) + _spread(None if found["low"] is None else found["high"] - found["mean"])


def _spread(half: float | None) -> str:
    return "" if half is None else f" ± {number(half)}"


def load_table(document: Mapping[str, Any]) -> tuple[Sequence[str], Rows]:
    """The columns and rows of the table of all loads. Columns without any value are left out."""
    headings = ["settings", "engine", "mode", "load", "items/s", "p50 ms", "p95 ms", "p99 ms", "failed", "queue ms"]
    headings += ["batch", "padding", "busy", "gpu", "accuracy", "per million", "delivered/s", "delivery p99 ms", "lost"]
    rows = []
    for cell in document["cells"]:
        server, delivery = cell["server"] or {}, cell["delivery"]
        rows.append(
            [
                variant_name(cell["variant"]) if cell["variant"] else "",
                server.get("engine") or "",
                cell["mode"],
                cell["load"] + (" (!)" if cell["limited"] else ""),
                *(figure(cell, name) for name in ("items_per_s", "p50_ms", "p95_ms", "p99_ms")),
                str(sum(cell["errors"].values())),
                _ms(server.get("queue_s")),
                number(server.get("mean_batch_size")),
                _percent(server.get("padding_share")),
                _percent(server.get("utilisation")),
                _percent(_mean([gpu["utilisation"] for gpu in cell["gpus"] if "utilisation" in gpu])),
                _percent(cell["accuracy"]),
                number(cell["cost_per_million"]),
                figure(cell, "delivered_per_s"),
                figure(cell, "delivery_p99_ms"),
                NONE if delivery is None else f"{delivery['lost']}, {delivery['duplicates']} twice",
            ]
        )
    usual = ("", NONE, "sync")
    kept = [place for place in range(len(headings)) if any(row[place] not in usual for row in rows)]
    return [headings[place] for place in kept], [[row[place] for place in kept] for row in rows]


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[Sequence[str], Rows]:
    """The columns and rows of the table of the verdicts; a worse figure is marked as Markdown does."""
    rows = [
        [
            found.what,
            found.figure,
            number(found.before),
            number(found.now),
            f"{found.ratio:.2f}",
            f"**{found.verdict}**" if found.verdict == "worse" else found.verdict,
        ]
        for found in verdicts
    ]
    return ("load", "figure", "before", "now", "ratio", "verdict"), rows


def _ms(seconds: float | None) -> str:
    return number(None if seconds is None else 1000 * seconds)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def findings(document: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each finding: searches, best settings, cross-check, errors, and what limits the figures."""
    yield from document.get("differences", ())
    for search in document["searches"]:
        settings = f" with {variant_name(search['variant'])}" if search["variant"] else ""
        if search["search"] == "capacity":
            yield f"Capacity{settings}: {number(search['items_per_s'])} items/s, with {search['load']}."
        elif search["items_per_s"] is None:
            yield (
                f"No rate that was tried{settings} keeps p99 below {search['p99_limit_ms']:g} ms; the capacity is "
                f"{number(search['capacity_items_per_s'])} items/s."
            )
        else:
            rate, share = search["items_per_s"], search["items_per_s"] / search["capacity_items_per_s"]
            yield (
                f"p99 stays below {search['p99_limit_ms']:g} ms{settings} up to {number(rate)} items/s, where it is "
                f"{number(search['p99_ms'])} ms; that is {share:.0%} of the capacity."
            )
    yield from search_winners(document["searches"])
    yield from winners(document["cells"])
    if check := document["cross_check"]:
        verdict = "agree within 5 %" if check["agrees"] else "do not agree within 5 %"
        yield (
            f"Cross-check by {check['tool']} ({check['load']}): {number(check['items_per_s'])} items/s, here "
            f"{number(check['own_items_per_s'])}{_spread(check.get('own_interval'))}: the two {verdict} "
            f"({check['ratio'] - 1:+.1%})."
        )
    for cell in document["cells"]:
        for reason, count in list(cell["errors"].items())[:3]:
            yield f"{name_of(cell)}: {count} x {reason}"
        if unsteady := cell.get("unsteady_runs"):
            yield f"{name_of(cell)}: the throughput was not steady within --seconds, in {unsteady} of the runs."
        if cell["limited"]:
            reasons = ", ".join(cell["limited"])
            yield f"{name_of(cell)} (!): the load generator was the limit, and the server can do more: {reasons}."


def winners(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Which settings win for what, for each load that several settings were measured under."""
    by_load: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_load.setdefault((cell["mode"], cell["load"]), []).append(cell)
    for (mode, load), rivals in by_load.items():
        if len({variant_name(cell["variant"]) for cell in rivals}) < 2:
            continue
        wins = [
            f"{what} with {variant_name(best['variant'])} ({figure(best, name)}{doubt})"
            for name, what in MORE.items()
            for best, doubt in _best([cell for cell in rivals if may_win(cell, name)], name)
        ]
        yield f"{mode}, {load}: {'; '.join(wins)}."


def search_winners(searches: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Which settings win a search that several were put through."""
    rivals: dict[str, list[Mapping[str, Any]]] = {}
    for search in searches:
        is_rate = search["search"] == "rate"
        what = f"Highest rate with p99 below {search['p99_limit_ms']:g} ms" if is_rate else "Highest capacity"
        rivals.setdefault(what, []).append(search)
    for what, found in rivals.items():
        best = max(found, key=lambda search: search["items_per_s"] or 0.0)
        if len(found) > 1 and best["items_per_s"]:
            yield f"{what}: {number(best['items_per_s'])} items/s, with {variant_name(best['variant'])}."


def may_win(cell: Mapping[str, Any], name: str) -> bool:
    """Whether a figure may win: the latencies of a server that refuses many requests are short."""
    return bool(name in cell["figures"]) and (name == "items_per_s" or failed_share(cell) <= MAX_FAILED_SHARE)


def _best(cells: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The best one of a figure, its accuracy, and a word where the second is as good for all that is known."""
    ranked = sorted(cells, key=lambda cell: cell["figures"][name]["mean"], reverse=name == "items_per_s")
    if ranked:
        is_close = len(ranked) > 1 and overlap(ranked[0]["figures"][name], ranked[1]["figures"][name])
        told = [] if ranked[0]["accuracy"] is None else [f"accuracy {_percent(ranked[0]['accuracy'])}"]
        told += [f"no clear difference to {variant_name(ranked[1]['variant'])}"] if is_close else []
        yield ranked[0], "".join(f", {word}" for word in told)


def items_line(document: Mapping[str, Any]) -> str:
    """What was sent."""
    return f"items: {document['settings'].get('items', 'not told')}"


def machine_line(document: Mapping[str, Any]) -> str:
    """The machine and the versions, in a line."""
    found = document["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in document["versions"].items())
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']:g} GiB, {found['system']}; {versions}"


def show(document: Mapping[str, Any], verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the tables and the findings."""
    console.print(terminal_table(*load_table(document)))
    for line in findings(document):
        console.print(line, markup=False)
    if verdicts:
        columns, rows = verdict_table(verdicts)
        marked = [[*row[:-1], row[-1].replace("**worse**", "[red]worse[/]")] for row in rows]
        console.print(terminal_table(columns, marked, title="Beside the older results", left=2))


def markdown(document: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """The same as Markdown."""
    lines = [f"# {document['target']}", "", f"{document['measured_at']}, {items_line(document)}.", ""]
    lines += [f"{machine_line(document)}.", ""]
    lines += [markdown_table(*load_table(document)), "", *(f"- {line}" for line in findings(document))]
    if verdicts:
        lines += ["", "## Beside the older results", "", markdown_table(*verdict_table(verdicts))]
    return "\n".join(lines) + "\n"


def write_files(
    document: Mapping[str, Any], verdicts: Sequence[Verdict], folder: Path, *, with_png: bool = True
) -> list[Path]:
    """Write `results.json`, `results.md`, `results.html` and, with matplotlib, a PNG of each plot into a folder."""
    from modalkit.benchmarks.bench.page import page
    from modalkit.benchmarks.bench.plots import write_plots

    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "results.json": to_json(document, indent=2) + b"\n",
        "results.md": markdown(document, verdicts).encode(),
        "results.html": page(document, verdicts).encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [*(folder / name for name in contents), *(write_plots(document, folder) if with_png else ())]
