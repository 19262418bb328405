"""Tables of texts: for a terminal, as Markdown and as HTML."""

import html
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

Rows = Sequence[Sequence[str]]


def terminal_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1) -> Table:
    """A table for rich, of which all columns but the first `left` are numbers. Cells may have rich's markup."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def html_table(columns: Sequence[str], rows: Rows) -> str:
    """The table as HTML, in a box that scrolls."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", columns)}</thead><tbody>{body}</tbody></table></div>'


def inline(text: str) -> str:
    """Text as HTML, with ``**bold**`` and ```code``` as Markdown has them."""
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escaped)
