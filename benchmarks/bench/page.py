"""Shows results as one HTML page that needs no other file and no network."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from modalkit.benchmarks.bench.charts import charts_of
from modalkit.benchmarks.bench.compare import Verdict
from modalkit.benchmarks.bench.report import findings, items_line, load_rows, machine_line, number
from modalkit.benchmarks.bench.results import name_of
from modalkit.benchmarks.bench.svg import drawn


def page(document: Mapping[str, Any], verdicts: Sequence[Verdict] = ()) -> str:
    """The page of a document of results."""
    template = Template((files("modalkit.benchmarks.bench") / "page.html").read_text(encoding="utf-8"))
    limited = [line for line in findings(document) if "(!)" in line]
    others = [line for line in findings(document) if "(!)" not in line]
    repeats = document["settings"].get("repeats", 1)
    return template.substitute(
        title=escape(document["target"]),
        when=escape(f"{document['measured_at'][:16].replace('T', ', ')} UTC; {items_line(document)}"),
        machine=escape(machine_line(document)),
        tiles="".join(_tile(*tile) for tile in _tiles(document)),
        warning="" if not limited else f'<section class="card warning"><h2>Limits</h2>{_list(limited)}</section>',
        comparison=_comparison(verdicts),
        table=_table(load_rows(document)),
        repeats=f"{repeats} runs" if repeats > 1 else "one run",
        findings="" if not others else f'<section class="card"><h2>Findings</h2>{_list(others)}</section>',
        charts="".join(
            f'<section class="card"><h2>{escape(chart.title)}</h2><p class="soft">{escape(chart.note)}</p>'
            f"{drawn(chart)}</section>"
            for chart in charts_of(document)
        ),
        document=escape(json.dumps({**document, "cells": [_short(cell) for cell in document["cells"]]}, indent=2)),
    )


def _tiles(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: value, unit and what it is."""
    cells = [cell for cell in document["cells"] if "p99_ms" in cell["figures"]]
    tiles = []
    if cells:
        best = max(cells, key=lambda cell: cell["figures"]["items_per_s"]["mean"])
        quick = min(cells, key=lambda cell: cell["figures"]["p99_ms"]["mean"])
        tiles.append((number(best["figures"]["items_per_s"]["mean"]), "items/s", f"most, with {name_of(best)}"))
        tiles.append((number(quick["figures"]["p99_ms"]["mean"]), "ms", f"lowest p99, with {name_of(quick)}"))
    tiles += [
        (number(search["items_per_s"]), "items/s", f"with p99 below {search['p99_limit_ms']:g} ms")
        for search in document["searches"]
        if search["search"] == "rate" and search["items_per_s"] is not None
    ]
    costs = [cell["cost_per_million"] for cell in document["cells"] if cell["cost_per_million"] is not None]
    if costs:
        tiles.append((number(min(costs)), "", "for a million items, at the price given"))
    starts = [seconds for seconds in document["cold_start_s"].values() if seconds is not None]
    if starts:
        tiles.append((number(min(starts)), "s", "from the start to the first answer"))
    if document["own_capacity"]:
        capacity = document["own_capacity"]["requests_per_s"]
        tiles.append((number(capacity), "requests/s", "the load generator itself can send"))
    return tiles


def _tile(value: str, unit: str, what: str) -> str:
    return f'<div class="tile"><b>{value}<small>{unit}</small></b><span>{escape(what)}</span></div>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    headings, *others = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in others)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _comparison(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = "".join(
        f"<tr><td>{escape(found.what)}</td><td>{found.figure}</td><td>{number(found.before)}</td>"
        f'<td>{number(found.now)}</td><td>{found.ratio:.2f}</td><td class="{found.verdict}">{found.verdict}</td></tr>'
        for found in verdicts
    )
    head = "".join(f"<th>{name}</th>" for name in ("load", "figure", "before", "now", "ratio", "verdict"))
    return (
        '<section class="card"><h2>Beside the older results</h2><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _short(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in ("latency_curve", "timeline")}
