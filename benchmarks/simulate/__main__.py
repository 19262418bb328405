"""Simulates batching rules on measured devices: ``python -m modalkit.benchmarks.simulate``; see its README."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modalkit.benchmarks.simulate.devices import make_device
from modalkit.benchmarks.simulate.mix import RATES, mix_table
from modalkit.benchmarks.simulate.mix import mix as mix_of
from modalkit.benchmarks.simulate.regret import study
from modalkit.benchmarks.simulate.report import print_regrets, print_results, write_results
from modalkit.benchmarks.simulate.study import CALLERS, LOADS, QUICK_CALLERS, QUICK_LOADS, Settings, run_study
from modalkit.benchmarks.simulate.tables import CPU, DEVICES, table_to_json

app = typer.Typer(add_completion=False, help=__doc__)

DEFAULT_REQUESTS, QUICK_REQUESTS = 20_000, 1_000


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    device: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(DEVICES)}; all if left out.")] = None,
    requests: Annotated[int | None, typer.Option(min=100, help="Requests of each simulation; 20,000.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two loads with 1,000 requests each; takes seconds.")] = False,
    noise: Annotated[float, typer.Option(min=0, help="Log-normal noise of each batch's time (sigma).")] = 0.05,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write, as `results/results.json`.")] = None,
) -> None:
    """Simulate each rule on each device under each load, and print the figures."""
    if context.invoked_subcommand is not None:
        return
    devices = device or list(DEVICES)
    if unknown := sorted(set(devices) - set(DEVICES)):
        raise typer.BadParameter(f"no device is called {unknown[0]!r}; there are {', '.join(DEVICES)}")
    settings = Settings(
        devices=devices,
        requests=requests or (QUICK_REQUESTS if quick else DEFAULT_REQUESTS),
        noise=noise,
        seed=seed,
        loads=QUICK_LOADS if quick else LOADS,
        callers=QUICK_CALLERS if quick else CALLERS,
    )
    results = run_study(settings, jobs)
    print_results(results, Console(width=130))
    if out is not None:
        write_results(settings, results, out)


@app.command()
def structures(jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2) -> None:
    """Run the planner from a cold start on dozens of cost structures, beside the best fixed batch size."""
    print_regrets(study(jobs), Console(width=130))


@app.command()
def mix(requests: Annotated[int, typer.Option(min=100, help="Interactive requests of each rate.")] = 3_000) -> None:
    """Send interactive requests beside a backlog of jobs, on each device, and print how each affects the other."""
    mixes = [mix_of(make_device(name, 0.05), rate, requests) for name in DEVICES for rate in RATES]
    Console().print(mix_table(mixes))


@app.command()
def measure(
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    name: Annotated[str, typer.Option(help="The name of the table.")] = CPU,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 5,
) -> None:
    """Measure the seconds of batches on this machine, with the bundled model (half a minute on two cores)."""
    from modalkit.benchmarks.simulate.measure import measure as measure_table

    table = measure_table(name, rounds)
    file.write_text(table_to_json(table), encoding="utf-8")
    print(table_to_json(table), end="")


@app.command()
def sizes(
    texts: Annotated[Path, typer.Argument(help="A file with one text per line.")],
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    source: Annotated[str, typer.Option(help="A description of the texts, for the file.")] = "measured texts",
) -> None:
    """Count the sizes of texts, for the simulations to draw from (`benchmarks/simulate/sizes.json`)."""
    from modalkit.benchmarks.simulate.measure import sizes_as_json

    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    file.write_text(sizes_as_json(lines, source), encoding="utf-8")


@app.command()
def pictures(folder: Annotated[Path, typer.Argument(help="The folder to draw into, docs/pictures.")]) -> None:
    """Draw what docs/batching.md shows: batches.png and latencies.png (needs matplotlib)."""
    from modalkit.benchmarks.simulate.pictures import draw_batches, draw_latencies

    folder.mkdir(parents=True, exist_ok=True)
    draw_batches(folder / "batches.png")
    draw_latencies(folder / "latencies.png")


@app.command()
def poison(
    items: Annotated[int, typer.Option(min=100, help="Items of each stream.")] = 2000,
    streams: Annotated[int, typer.Option(min=1, help="Streams of each row, whose mean is shown.")] = 10,
) -> None:
    """Count the runs that failing items cause, beside the best plan that knows their share (a minute)."""
    from modalkit.benchmarks.simulate.poison import BATCH_SIZES, SHARES, poison_table

    poison_table(SHARES, BATCH_SIZES, items, streams, Console(width=130))


if __name__ == "__main__":
    app()
