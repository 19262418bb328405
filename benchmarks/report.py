"""The studies with targets, in one table for each: ``python -m modalkit.benchmarks.report``, see its ``--help``."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modalkit.benchmarks.bench.results import machine, versions_of
from modalkit.benchmarks.measurement import Figure, Study
from modalkit.benchmarks.tables import terminal_table
from modalkit.pipelines.extras import install_command

DEFAULT_TEXTS = 2_000
DEFAULT_ENGINE = "torch/float32"
RATIO = "x"
TOLERANCE = 0.1


class StudyName(StrEnum):
    """The names of the studies."""

    OVERHEAD = "overhead"
    GROWTH = "growth"
    END_TO_END = "end-to-end"
    HTTP = "http"


def make_study(name: StudyName, texts: int = DEFAULT_TEXTS, engine: str = DEFAULT_ENGINE) -> Study:
    """The study of that name; `texts` and `engine` are for the study that runs the model."""
    if name is StudyName.OVERHEAD:
        try:
            from modalkit.benchmarks.overhead import OverheadStudy
        except ImportError:
            raise typer.BadParameter(
                f"{name} needs the library batched: {install_command('bench')}, or choose others by --only"
            ) from None

        return OverheadStudy()
    if name is StudyName.GROWTH:
        from modalkit.benchmarks.growth import GrowthStudy

        return GrowthStudy()
    if name is StudyName.HTTP:
        from modalkit.benchmarks.jobs import HttpStudy

        return HttpStudy()
    from modalkit.benchmarks.end_to_end import EndToEndStudy
    from modalkit.benchmarks.in_process import BundledPipeline, corpus_items

    engine_name, _, dtype = engine.partition("/")
    return EndToEndStudy(BundledPipeline(engine=engine_name, dtype=dtype or "auto"), corpus_items(texts))


def figures_table(title: str, figures: Sequence[Figure]) -> Table:
    """One line per figure: median, range over the rounds, target, and whether the target is met."""
    rows = []
    for figure in figures:
        spread = f"{min(figure.rounds):.3g} .. {max(figure.rounds):.3g}" if len(figure.rounds) > 1 else ""
        verdict = {None: "", True: "met", False: "[red]missed[/red]"}[figure.is_met]
        value = f"{figure.value:.3g} {figure.unit}" if figure.rounds else "not measured"
        rows.append([figure.name, value, spread, _target(figure), verdict])
    return terminal_table(("figure", "median", "range", "target", ""), rows, title=title)


def _target(figure: Figure) -> str:
    if figure.at_most is not None:
        return f"<= {figure.at_most:.3g}"
    return "" if figure.at_least is None else f">= {figure.at_least:.3g}"


def as_json(figures: Mapping[str, Sequence[Figure]], engine: str = DEFAULT_ENGINE) -> str:
    """The figures of each study, with the machine, the versions and the engine of the model, as JSON."""
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions_of("torch", "transformers", "batched"),
        "engine": engine,
        "studies": {study: [_figure_as_dict(figure) for figure in found] for study, found in figures.items()},
    }
    return json.dumps(document, indent=2) + "\n"


def _figure_as_dict(figure: Figure) -> dict[str, object]:
    targets = {"at_most": figure.at_most, "at_least": figure.at_least}
    return {
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.value if figure.rounds else None,
        "rounds": figure.rounds,
        **{name: bound for name, bound in targets.items() if bound is not None},
        **({} if figure.is_met is None else {"met": figure.is_met}),
    }


def read_baseline(path: Path, engine: str = DEFAULT_ENGINE) -> dict[str, float]:
    """The medians of the ratios that ``--json`` wrote, by study and name.

    Raises `typer.BadParameter`, also where another engine ran the model.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        measured_engine = document["engine"]
        medians = {
            f"{study}: {figure['name']}": figure["median"]
            for study, found in document["studies"].items()
            for figure in found
            if figure["unit"] == RATIO and figure["median"] is not None
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise typer.BadParameter(f"--baseline {path}: {error}; give a file that --json wrote") from error
    if measured_engine != engine:
        raise typer.BadParameter(f"--baseline {path}: its engine is {measured_engine}, not {engine}; give --engine")
    return medians


def regressions(figures: Mapping[str, Sequence[Figure]], baseline: Mapping[str, float]) -> list[str]:
    """A line for each ratio with a target that is more than 10 % worse than in the baseline.

    Times are not compared: they are those of another machine, or of another day.
    """
    lines = []
    for study, found in figures.items():
        for figure in found:
            before = baseline.get(f"{study}: {figure.name}")
            if before is None or not figure.rounds or figure.unit != RATIO or before <= 0:
                continue
            change = figure.value / before - 1
            is_worse = (figure.at_most is not None and change > TOLERANCE) or (
                figure.at_least is not None and change < -TOLERANCE
            )
            if is_worse:
                lines.append(f"{study}: {figure.name}: {figure.value:.3g} after {before:.3g} ({change:+.0%})")
    return lines


def run_study(study: Study, rounds: int, show: Callable[[str], None]) -> list[Figure]:
    """Run a study for `rounds` rounds; `show` gets progress messages."""
    show(f"{study.name}: warming up")
    study.warm_up()
    for current in range(1, rounds + 1):
        show(f"{study.name}: round {current} of {rounds}")
        study.run_round()
    return study.figures()


def main(
    only: Annotated[list[StudyName] | None, typer.Option(help="Run only this study; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 3,
    texts: Annotated[int, typer.Option(min=1, help="Texts of the corpus, at most 4,000.")] = DEFAULT_TEXTS,
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the model, as in its entry; the same in all runs that are compared. auto: measured."
        ),
    ] = DEFAULT_ENGINE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target is missed.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="Older --json: exit with 1 if a ratio is more than 10 % worse.", exists=True)
    ] = None,
) -> None:
    """Run the studies (a quarter of an hour on two cores) and print their figures."""
    before = {} if baseline is None else read_baseline(baseline, engine)
    console, progress = Console(width=110), Console(stderr=True)
    figures: dict[str, list[Figure]] = {}
    for name in only or list(StudyName):
        figures[name.value] = run_study(make_study(name, texts, engine), rounds, progress.print)
        console.print(figures_table(name.value, figures[name.value]))
    if json_file is not None:
        json_file.write_text(as_json(figures, engine), encoding="utf-8")
    for line in (worse := regressions(figures, before)):
        console.print(f"[red]worse[/red] {line}")
    if before and not worse:
        console.print("No ratio is more than 10 % worse than in the baseline.")
    if worse or (check and any(figure.is_met is False for found in figures.values() for figure in found)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
