"""The command ``modalkit bench``."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from modalkit.benchmarks.bench.assemble import CLIENTS, WORKER, Options, as_settings, loads_of, search_load, session_of
from modalkit.benchmarks.bench.compare import TOLERANCE, Verdict, compared, differences
from modalkit.benchmarks.bench.cross_check import TOOLS, cross_check, wrk_program
from modalkit.benchmarks.bench.plots import require_matplotlib
from modalkit.benchmarks.bench.report import number, show, write_files
from modalkit.benchmarks.bench.results import Cell, Results, name_of, read_document, variant_name
from modalkit.benchmarks.bench.search import find_capacity, find_rate
from modalkit.benchmarks.bench.session import MODES, OnRun, OpenSession
from modalkit.benchmarks.load import PRESETS, Load, OptionError, own_capacity
from modalkit.service.cli.common import NOT_NEGATIVE, POSITIVE, ConfigFiles, ModelOption, notices, whole
from modalkit.service.cli.records import ColumnOption, FormatOption

PIPED_WIDTH = 1000
OWN_CAPACITY_S = 1.5
OWN_SHARE = 0.8
"""A run with more of the requests per second that the generator itself can send was limited by it."""

app = typer.Typer(add_completion=False)


@app.command("bench")
def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="A URL, serve, worker, docker:IMAGE, compose:FILE, or modal:APP/CLASS.", metavar="[TARGET]"
        ),
    ] = "serve",
    kind: Annotated[
        str | None, typer.Option("--as", metavar="|".join(PRESETS), help="What kind of server it is; ours by default.")
    ] = None,
    body: Annotated[
        str | None, typer.Option(help='A JSON template of requests to any server, as \'{"text": "$text"}\'.')
    ] = None,
    answer: Annotated[str | None, typer.Option(help="The path of the label in an answer, as data.0.label.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="A header, NAME: VALUE; may be repeated.")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="MODALKIT_API_KEY",
            help="The API key, sent as Authorization: Bearer; for another auth_header, give --header.",
        ),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="|".join(MODES), help="How items are sent.")] = "sync",
    list_length: Annotated[
        int | None, typer.Option(help="Items of a request: 32 in mode batch, 1000 in ndjson, else 1.", **whole(1))
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(help="What results of jobs are read from: webhook (the default), redis, or the URL of a Redis."),
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(help=f"Clients of a closed loop; several numbers are several loads, by default {CLIENTS}."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests per second of an open loop, in place of clients; may be several.")
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(help="Pattern of an open loop: poisson (the default), constant, bursty, or a file of times."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Measured seconds of each run.", **POSITIVE)] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds before that, not counted.", **NOT_NEGATIVE)] = 2.0,
    until_steady: Annotated[
        bool, typer.Option("--until-steady", help="End a run as soon as the throughput no longer changes.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Runs of each load, for confidence intervals.", **whole(1))] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as failed.", **POSITIVE)] = 30.0,
    processes: Annotated[
        int | None, typer.Option(help="Of the load generator; by default as many as it takes.", **whole(1))
    ] = None,
    input_path: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", help="Items: a .txt, .jsonl, .csv or .parquet file.", exists=True, dir_okay=False
        ),
    ] = None,
    file_format: FormatOption = None,
    column: ColumnOption = None,
    label: Annotated[
        str | None, typer.Option(help="Column or key of the input with the right label, for the accuracy.")
    ] = None,
    length_mix: Annotated[
        str | None, typer.Option(help="Sizes of made-up items and their shares, as 16:70,256:30.")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="Send items that the model makes up (sample_items), not texts.")
    ] = False,
    capacity: Annotated[bool, typer.Option("--capacity", help="Search the highest throughput.")] = False,
    p99_ms: Annotated[
        float | None, typer.Option(help="Search the highest rate with p99 below this.", **POSITIVE)
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="A setting and its values, as max_batch_size=8,32; may be repeated.")
    ] = None,
    config: ConfigFiles = None,
    model: ModelOption = None,
    port: Annotated[int, typer.Option(help="The port that the container serves.", **whole(1, 65535))] = 8000,
    docker_argument: Annotated[
        list[str] | None, typer.Option(help="Argument of docker create, as --gpus=all; may be repeated.")
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(help="Seconds that what is started has until its first answer, downloads included.", **POSITIVE),
    ] = 300.0,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine, for the cost of a million items.", **POSITIVE)
    ] = None,
    tool: Annotated[
        str | None, typer.Option(metavar="|".join(TOOLS), help="Check the last closed loop by another tool.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.", file_okay=False)] = Path(
        "bench"
    ),
    png: Annotated[
        bool | None, typer.Option("--png/--no-png", help="Draw PNG files; by default where matplotlib is installed.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Older results.json; the exit code is 1 if a figure is worse.", exists=True)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Share by which a figure may differ from the older one.", **NOT_NEGATIVE)
    ] = TOLERANCE,
) -> None:
    """Measure a server, a container, a worker or a class on Modal under load.

    Without a target, `modalkit serve` is started with the configuration of this folder. A URL may be of any server:
    --as says of which kind, or --body how a request looks: $text stands for the field text of an item, $item for the
    item, and {"$each": ...} for the list of all items of a request. The results are in --output: results.json,
    results.md, results.html and a PNG of each plot.

    The exit code is 1 when the load generator itself was the limit in a run, when a figure is worse than in --compare
    or none of its loads was measured, when jobs were lost, or when nothing was answered.

    [bold]Examples[/bold]

    modalkit bench

    modalkit bench http://127.0.0.1:8000 --clients 1,16,64 --price-per-hour 0.5

    modalkit bench http://gpu-box:8080 --as tei --p99-ms 100

    modalkit bench --sweep max_batch_size=8,32,128 --capacity

    modalkit bench http://127.0.0.1:9000/classify --body '{"inputs": "$text"}' --answer 0.label -i test.csv --label y
    """
    given = locals()
    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    if png:
        require_matplotlib("--png")
    before = None if compare is None else read_document(compare)
    base = Load(seconds=seconds, warm_up_s=warm_up, until_steady=until_steady, timeout_s=timeout, processes=processes)
    if is_search := capacity or p99_ms is not None:
        loads, searched = [], search_load(base, clients, rate, arrivals, has_limit=p99_ms is not None)
    else:
        loads, searched = loads_of(base, clients, rate, arrivals), base
    if tool is not None:
        _check_tool(tool, options, loads)
    if processes is not None and target == WORKER:
        raise OptionError("a worker runs in the one process that sends: leave out --processes")
    with _ending_on_sigterm(), _progress() as on_run, session_of(options, on_run) as session:
        settings = as_settings(options, seconds=seconds, warm_up=warm_up, items=session.inputs.source)
        results = Results(target=session.target.name, settings=settings)
        for variant in options.variants():
            notices.print(f"{target}: {variant_name(variant)}")
            with session.opened(variant) as opened:
                if opened.running.url is not None and results.own_capacity is None:
                    results.own_capacity = _own_capacity(opened, processes, min(OWN_CAPACITY_S, seconds))
                if opened.cold_start_s is not None:
                    results.cold_start_s[variant_name(variant)] = opened.cold_start_s
                for load in loads:
                    _keep(results, [_measured(opened, load, results)], output)
                if is_search:
                    _search(opened, searched, p99_ms, results, output)
                if tool is not None:
                    own = [cell for cell in results.cells if not cell.open][-1]
                    results.cross_check = cross_check(tool, opened.endpoint, session.inputs.items, base, own, repeats)
    document = results.document()
    verdicts = []
    if before is not None:
        verdicts = compared(document, before, tolerance)
        document["differences"] = differences(document, before)
    console = Console()
    show(document, verdicts, console if console.is_terminal else Console(width=PIPED_WIDTH))
    paths = write_files(document, verdicts, output, with_png=png is not False)
    notices.print(f"The results are in {', '.join(map(str, paths))}")
    failures = list(_failures(results, verdicts))
    if before is not None and not verdicts:
        failures.append(f"--compare {compare} has none of these loads: give the settings, mode and clients of then")
    if failures:
        for failure in failures:
            notices.print(f"modalkit bench: {failure}")
        raise typer.Exit(1)


def _check_tool(tool: str, options: Options, loads: Sequence[Load]) -> None:
    """Raise `BenchError` where the tool cannot check these loads: before anything is measured, which takes time."""
    if tool not in TOOLS:
        raise OptionError(f"--tool {tool!r}: give one of {', '.join(TOOLS)}")
    if any(load.is_open for load in loads):
        raise OptionError("--tool drives a closed loop: give --clients, not --rate")
    if options.is_called:
        raise OptionError("--tool sends HTTP requests, which a worker and a class on Modal do not take: leave it out")
    if len(options.variants()) > 1:
        raise OptionError("--tool checks one setting at a time: leave out --sweep")
    if tool == "wrk":
        wrk_program()


def _own_capacity(opened: OpenSession, processes: int | None, seconds: float) -> dict[str, float]:
    found = own_capacity(opened.endpoint, opened.session.inputs.items, processes=processes or 1, seconds=seconds)
    notices.print(f"The load generator itself can send {number(found.requests_per_s)} requests/s")
    return {"requests_per_s": found.requests_per_s, "processes": found.processes}


def _measured(opened: OpenSession, load: Load, results: Results) -> Cell:
    cell = opened.measure(load)
    own = results.own_capacity
    length = 1 if opened.running.url is None else opened.endpoint.list_length
    rate = cell.figures["items_per_s"].mean / length
    if own is not None and rate > OWN_SHARE * own["requests_per_s"] * cell.client["processes"] / own["processes"]:
        cell.limited.append(f"{number(rate)} requests/s are near what the generator itself can send")
    return cell


def _search(opened: OpenSession, base: Load, p99_ms: float | None, results: Results, output: Path) -> None:
    length = 1 if opened.running.url is None else opened.endpoint.list_length

    def measure(load: Load) -> Cell:
        cell = _measured(opened, load, results)
        _keep(results, [cell], output)
        return cell

    _, found = find_capacity(measure, base, length)
    results.searches.append(found)
    if p99_ms is not None:
        before = len(results.cells)
        results.cells[before:], found = find_rate(measure, base, p99_ms, found["items_per_s"], length)
        results.searches.append(found)
    _keep(results, [], output)


def _keep(results: Results, cells: list[Cell], output: Path) -> None:
    """Keep what was measured so far in a file, in case the run is broken off."""
    results.cells += cells
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_bytes(to_json(results.document(), indent=2) + b"\n")


def _failures(results: Results, verdicts: list[Verdict]) -> Iterator[str]:
    """Why the exit code is 1."""
    for line in results.limited:
        yield f"the load generator was the limit ({line}); give it more --processes, or another machine"
    for cell in results.cells:
        if not cell.answered:
            why = next(
                (f": {reason}" for reason in cell.errors), " within --seconds; give more, or a lower --list-length"
            )
            yield f"{name_of(cell)}: nothing was answered{why}"
        if cell.delivery is not None and cell.delivery["lost"]:
            yield f"{cell.load}: {cell.delivery['lost']} accepted jobs were not delivered to --queue"
    for found in verdicts:
        if found.verdict == "worse":
            yield f"{found.what}: {found.figure} is worse, {number(found.now)} after {number(found.before)}"


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an error does: what was started stops, and settings are changed back."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[OnRun]:
    """Shows how far a run is, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=notices, transient=True, disable=not notices.is_terminal) as progress:
        task = progress.add_task("", total=None, rate="", visible=False)

        def on_run(name: str, load: Load, elapsed_s: float, answered: int, failed: int) -> None:
            total_s = load.warm_up_s + load.seconds if load.requests is None else None
            rate = f"{number(answered / max(elapsed_s, 1e-9))} items/s" + (f", {failed} failed" if failed else "")
            progress.update(
                task, description=f"{load}, {name}", completed=elapsed_s, total=total_s, rate=rate, visible=True
            )

        yield on_run
