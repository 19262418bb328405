"""Measures modalkit in turn with other servers: ``python -m modalkit.benchmarks.peers``; ``--help`` has the options."""

import json
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Annotated, Any

import typer
from rich.console import Console

from modalkit.benchmarks.bench.results import machine
from modalkit.benchmarks.bench.svg import picture
from modalkit.benchmarks.peers.contenders import CONTENDERS
from modalkit.benchmarks.peers.environments import ENVIRONMENTS, BuildError, build, environment_names, versions_of
from modalkit.benchmarks.peers.libraries import LIBRARIES, measure_libraries
from modalkit.benchmarks.peers.page import as_html, as_markdown, throughput_chart
from modalkit.benchmarks.peers.run import NORMAL, QUICK, TEXTS_KEY, Run
from modalkit.service.version import VERSION

RESULTS = Path(__file__).parent / "results"
NAMES = [one.name for one in CONTENDERS]
SHARED = ("torch", "transformers", "fastapi")

progress = Console(stderr=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure only these, may be repeated: {', '.join(NAMES)}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure each for a second: to see that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, where an earlier run was broken off.")] = False,
    build_only: Annotated[bool, typer.Option("--build", help="Only build the environments.")] = False,
    pages_only: Annotated[bool, typer.Option("--pages", help="Only make the pages and the picture anew.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; else that of the committed ones, or .cache/peers/results with the two above."
        ),
    ] = None,
) -> None:
    """Build the environments, measure all servers in turn (15 minutes on 2 cores), and write the JSON and the pages.

    A run that was broken off goes on where it was: its steps are kept in `.cache/peers`.
    """
    if pages_only:
        folder = out or RESULTS
        write(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder)
        return
    names = only or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        raise typer.BadParameter(f"no server is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    try:
        for name in environment_names():
            if name in (*names, LIBRARIES):
                build(name, progress.print)
    except BuildError as error:
        progress.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None
    if build_only:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are killed, too
    file = ENVIRONMENTS / f"{'quick' if quick else 'run'}{'-only' if only else ''}.json"
    if fresh:
        file.unlink(missing_ok=True)
    run = Run(file, names, QUICK if quick else NORMAL, _head(names), progress.print)
    run.all()
    if not only:
        run.document["libraries"] = measure_libraries(quick=quick, show=progress.print)
    write(run.document, out or (ENVIRONMENTS / "results" if only or quick else RESULTS))
    file.unlink()


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json`, and what is made of it: `README.md`, `page.html` and `throughput.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**document, "steps": {key: step for key, step in document["steps"].items() if key != TEXTS_KEY}}
    contents = {
        "results.json": json.dumps(document, indent=1) + "\n",
        "README.md": as_markdown(document),
        "page.html": as_html(document),
        "throughput.svg": picture(throughput_chart(document)),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    progress.print(f"written: {', '.join(str(folder / name) for name in contents)}")


def _head(names: list[str]) -> dict[str, object]:
    found = machine()
    own = {name: versions_of(name) for name in (*names, LIBRARIES)}
    packages = {one.title: own[one.name].get(one.package) for one in CONTENDERS if one.name in names}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, Python {python_version()}",
        "versions": {
            "modalkit": VERSION,
            **{name: version(name) for name in SHARED},
            **{title: found for title, found in packages.items() if found},
        },
        "environments": own,
    }


if __name__ == "__main__":
    typer.run(main)
