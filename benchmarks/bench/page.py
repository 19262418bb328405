"""Shows results as one HTML page that needs no other file and no network."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from modalkit.benchmarks.bench.charts import charts_of
from modalkit.benchmarks.bench.compare import Verdict
from modalkit.benchmarks.bench.report import (
    findings,
    items_line,
    load_table,
    machine_line,
    may_win,
    number,
    verdict_table,
)
from modalkit.benchmarks.bench.results import name_of
from modalkit.benchmarks.bench.svg import drawn
from modalkit.benchmarks.tables import html_table, inline


def page(document: Mapping[str, Any], verdicts: Sequence[Verdict] = ()) -> str:
    """The page of a document of results."""
    limited = [line for line in findings(document) if "(!)" in line]
    others = [line for line in findings(document) if "(!)" not in line]
    repeats = document["settings"].get("repeats", 1)
    spread = f"Means of {repeats} runs; ± is half of the 95 % confidence interval." if repeats > 1 else "One run each."
    about_loads = f"{spread} (!): the load generator was the limit."
    charts = [section(chart.title, drawn(chart), note=chart.note) for chart in charts_of(document)]
    figures = json.dumps({**document, "cells": [_short(cell) for cell in document["cells"]]}, indent=2)
    parts = [
        f'<div class="tiles">{"".join(_tile(*tile) for tile in _tiles(document))}</div>',
        section("Limits", _list(limited), kind="warning") if limited else "",
        section("Beside the older results", html_table(*verdict_table(verdicts))) if verdicts else "",
        section("Loads", html_table(*load_table(document)), note=about_loads),
        section("Findings", _list(others)) if others else "",
        f'<div class="charts">{"".join(charts)}</div>',
        f"<details><summary>Settings and all figures, as JSON</summary><pre>{escape(figures)}</pre></details>",
    ]
    when = f"{document['measured_at'][:16].replace('T', ', ')} UTC; {items_line(document)}"
    return html_page(document["target"], [when, machine_line(document)], parts)


def html_page(title: str, facts: Sequence[str], parts: Sequence[str]) -> str:
    """A page of these parts, below the title and some lines."""
    template = Template((files("modalkit.benchmarks.bench") / "page.html").read_text(encoding="utf-8"))
    lines = "".join(f'<p class="soft">{escape(fact)}</p>' for fact in facts)
    return template.substitute(title=escape(title), facts=lines, parts="\n".join(parts))


def section(title: str, content: str, *, note: str = "", kind: str = "") -> str:
    """A part of a page in a frame."""
    about = f'<p class="soft">{inline(note)}</p>' if note else ""
    return f'<section class="card {kind}"><h2>{inline(title)}</h2>{about}{content}</section>'


def _tiles(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: value, unit and what it is."""
    cells = [cell for cell in document["cells"] if "p99_ms" in cell["figures"]]
    tiles = []
    if cells:
        best = max(cells, key=lambda cell: cell["figures"]["items_per_s"]["mean"])
        quick = min(
            [cell for cell in cells if may_win(cell, "p99_ms")] or cells,
            key=lambda cell: cell["figures"]["p99_ms"]["mean"],
        )
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
    return f'<div class="tile"><b>{value} <small>{unit}</small></b><span>{escape(what)}</span></div>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _short(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name not in ("latency_curve", "timeline")}
