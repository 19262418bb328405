"""The Markdown and the HTML of a run."""

from collections.abc import Mapping
from typing import Any

from modalkit.benchmarks.bench.charts import Chart, Series
from modalkit.benchmarks.bench.page import html_page, section
from modalkit.benchmarks.bench.svg import drawn
from modalkit.benchmarks.peers.contenders import OURS, contender
from modalkit.benchmarks.peers.run import FEW
from modalkit.benchmarks.peers.tables import documented_rates_of, rates_of, tables_of
from modalkit.benchmarks.tables import html_table, markdown_table

TITLE = "modalkit beside other servers"
INTRODUCTION = (
    "The bundled sentiment model on texts of mixed lengths, one text a request; servers and load generator share one "
    "machine. All servers but Infinity run the same pipeline code; each has an environment of its own, and is measured "
    "alone."
)


def as_markdown(document: Mapping[str, Any]) -> str:
    """All tables, as a page of the repository."""
    parts = [f"# {TITLE}", INTRODUCTION, _facts(document), "Made by `make bench-peers`; do not edit."]
    for table in tables_of(document):
        parts += [f"## {table.title}", *([table.note] if table.note else []), markdown_table(table.columns, table.rows)]
    return "\n\n".join(parts) + "\n"


def as_html(document: Mapping[str, Any]) -> str:
    """One page without other files: bars of the throughput, and all tables."""
    sections = [section(one.title, html_table(one.columns, one.rows), note=one.note) for one in tables_of(document)]
    chart = throughput_chart(document)
    return html_page(TITLE, [_facts(document), INTRODUCTION], [section(chart.title, drawn(chart)), *sections])


def throughput_chart(document: Mapping[str, Any]) -> Chart:
    """The items per second of each server, at the best of a sweep and at its documented settings, ours being both."""
    steps = document["steps"]
    best, documented = rates_of(steps), documented_rates_of(steps)
    if OURS in best:
        documented[OURS] = best[OURS]
    shown = {"at the best of a sweep": best, "as its documentation recommends": documented}
    places = {name: index for index, name in enumerate(best)}
    return Chart(
        name="throughput",
        title=f"items/s with {FEW} clients, float32",
        note="",
        x_label="",
        y_label="items/s",
        series=[
            Series(name, [(places[of], found) for of, found in rates.items() if of in places])
            for name, rates in shown.items()
        ],
        bars=[contender(name).title.partition(",")[0] for name in best],
    )


def _facts(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['date'][:10]}; {document['machine']}; {versions}."
