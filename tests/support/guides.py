"""What the guides in docs/ hold: files they quote, commands, output."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def guide(name: str) -> str:
    """The text of a guide."""
    return (ROOT / "docs" / name).read_text()


def section(text: str, title: str) -> str:
    """The part of a guide under a heading of the second level."""
    return text.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language; an empty one means output."""
    return [
        block
        for found, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if found == language
    ]


def quoted_files(text: str) -> dict[str, str]:
    """The files that a guide quotes, by their paths: blocks whose first line is a comment with the path."""
    first_lines = re.compile(r"# (examples/\S+)\n")
    quotes = [(first_lines.match(block), block) for block in blocks(text, "python") + blocks(text, "yaml")]
    return {found[1]: block[found.end() :] for found, block in quotes if found}


def files_in(folder: str) -> dict[str, str]:
    """The files of an example, by their paths."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".yaml")
    }
