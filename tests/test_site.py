"""The documentation as a site: it builds, and each of its links leads somewhere."""

import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import modalkit
from modalkit import modal_config, modal_service, task_queue, testing

ROOT = Path(__file__).parents[1]
GUIDES = {path.name for path in (ROOT / "docs").glob("*.md")}
ELSEWHERE = ("http", "https", "javascript", "mailto")


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)

    def targets(self) -> Iterator[tuple[str, Path, str]]:
        """Each link to a file, with the file and the anchor in it."""
        for link in self.links:
            url, anchor = urldefrag(link)
            address = urlsplit(url)
            if address.scheme not in ELSEWHERE:
                path = Path(unquote(address.path))
                yield link, (self.path.parent / path).resolve() if url else self.path, unquote(anchor)


def test_the_site_builds_and_each_link_leads_to_a_file_and_an_anchor() -> None:
    """By `make docs` with the tools beside this Python; zensical is strict, and checks links between Markdown files."""
    environment = Path(sys.executable).parents[1]
    command = ["make", "docs", f"VENV={environment}", "-o", f"{environment}/.installed-dev"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: Page(path) for path in (ROOT / "build" / "site").glob("*.html") if path.name != "404.html"}
    assert len(pages) > len(GUIDES)
    broken = [
        (page.path.name, link)
        for page in pages.values()
        for link, target, anchor in page.targets()
        if not target.exists() or (target in pages and anchor not in pages[target].anchors)
    ]
    assert broken == []


def test_every_guide_is_in_the_navigation_and_in_the_readme() -> None:
    navigation = re.findall(r'= "(\S+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(navigation) == sorted({"index.md"} | GUIDES)
    assert set(re.findall(r"\]\(docs/([^)#]+\.md)", (ROOT / "README.md").read_text())) == GUIDES


def in_the_reference() -> set[str]:
    """The names in the reference, without their modules."""
    named = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    return {name.rpartition(".")[2] for name in named}


def test_the_reference_has_the_errors_that_public_names_raise() -> None:
    values = [getattr(modalkit, name) for name in modalkit.__all__]
    members = [member for value in values if inspect.isclass(value) for member in inspect.getmembers(value)]
    methods = [method for name, method in members if not name.startswith("_")]
    ours = [value for value in (*values, *methods) if str(getattr(value, "__module__", "")).startswith("modalkit")]
    raised = set(re.findall(r"`(\w+Error)`", "".join(filter(None, map(inspect.getdoc, ours)))))
    assert "QueueFullError" in raised
    assert raised - vars(builtins).keys() - in_the_reference() == set()


def test_the_reference_has_what_the_guides_import() -> None:
    imported = set[str]()
    for path in (ROOT / "docs").glob("*.md"):
        for names in re.findall(r"^from modalkit\S* import ([^(\n#]+)", path.read_text(), re.MULTILINE):
            imported |= set(names.strip().split(", "))
    assert "InferenceWorker" in imported
    assert imported - in_the_reference() == set()


def test_the_reference_has_each_public_name() -> None:
    named = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    modules = (modalkit, modal_config, modal_service, task_queue, testing)
    names = {name: f"{module.__name__}.{name}" for module in reversed(modules) for name in module.__all__}
    assert set(names.values()) <= set(named)
