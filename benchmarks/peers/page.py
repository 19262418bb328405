"""The Markdown and the HTML of a run."""

import html
import re
from collections.abc import Mapping
from typing import Any

from modalkit.benchmarks.peers.contenders import CONTENDERS, OURS
from modalkit.benchmarks.peers.run import FEW
from modalkit.benchmarks.peers.tables import Table, tables_of

TITLE = "modalkit beside other servers"
INTRODUCTION = (
    "The bundled sentiment model on texts of mixed lengths, one text a request; servers and load generator share one "
    "machine. All servers but Infinity run the same pipeline code; each has an environment of its own, and is measured "
    "alone."
)
STYLE = """
:root { color-scheme: light dark; --ours: #2f6fed; --peer: #9aa4b2; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.4rem }
.facts, .note { opacity: .75 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .35rem .8rem; align-items: center; }
.bar { background: var(--peer); border-radius: 3px; color: #fff; padding: 0 .5rem; min-width: fit-content; }
.bar.ours { background: var(--ours); }
strong { color: #c0392b }
"""


def as_markdown(document: Mapping[str, Any]) -> str:
    """All tables, as a page of the repository."""
    parts = [f"# {TITLE}", INTRODUCTION, _facts(document), "Made by `make bench-peers`; do not edit."]
    for table in tables_of(document):
        parts += [f"## {table.title}", *([table.note] if table.note else []), _markdown(table)]
    return "\n\n".join(parts) + "\n"


def as_html(document: Mapping[str, Any]) -> str:
    """One page without other files: bars of the throughput, and all tables."""
    sections = "".join(_section(table) for table in tables_of(document))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{TITLE}</title><style>{STYLE}</style><h1>{TITLE}</h1>"
        f"<p class='facts'>{html.escape(_facts(document))}</p><p>{INTRODUCTION}</p>"
        f"<h2>items/s with {FEW} clients, float32</h2>{_bars(document)}{sections}</html>\n"
    )


def _facts(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"{document['date'][:10]}; {document['machine']}; {versions}."


def _markdown(table: Table) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join(lines)


def _section(table: Table) -> str:
    def cells(tag: str, values: Any) -> str:
        return "<tr>" + "".join(f"<{tag}>{_inline(value)}</{tag}>" for value in values) + "</tr>"

    note = f"<p class='note'>{_inline(table.note)}</p>" if table.note else ""
    rows = "".join(cells("td", row) for row in table.rows)
    head = cells("th", table.columns)
    return f"<h2>{_inline(table.title)}</h2>{note}<div class='scroll'><table>{head}{rows}</table></div>"


def _inline(text: str) -> str:
    """Text with the two marks of Markdown that the tables use."""
    escaped = html.escape(text)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escaped)


def _bars(document: Mapping[str, Any]) -> str:
    steps = document["steps"]
    rates = [
        (step[f"clients_{FEW}"]["per_s"], one)
        for one in CONTENDERS
        if f"clients_{FEW}" in (step := steps.get(f"float32/{one.name}", {}))
    ]
    most = max((rate for rate, _ in rates), default=1.0)
    rows = "".join(
        f"<span>{html.escape(one.title)}</span>"
        f"<span class='bar{' ours' * (one.name == OURS)}' style='width:{100 * rate / most:.1f}%'>{rate:.0f}</span>"
        for rate, one in sorted(rates, key=lambda pair: -pair[0])
    )
    return f"<div class='bars'>{rows}</div>"
