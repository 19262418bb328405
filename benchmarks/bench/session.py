"""Puts loads on a target, some times each, and joins what the generator, the server and the GPU tell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from time import perf_counter
from typing import Any

import httpx

from modalkit.benchmarks.bench.delivery import Delivery, Receiver, jobs_endpoint, require_delivery, wait_for_deliveries
from modalkit.benchmarks.bench.in_process import ModalTarget, WorkerTarget
from modalkit.benchmarks.bench.inputs import Inputs
from modalkit.benchmarks.bench.results import Cell, Figure, curve_of, errors_of, figures_of, timeline_of
from modalkit.benchmarks.bench.server_side import ServerSide, gpu_use, of_records, scrape, server_side
from modalkit.benchmarks.bench.targets import Running, Target, Variant, first_answer_s
from modalkit.benchmarks.load import BenchError, Endpoint, Load, Measured, run_load
from modalkit.benchmarks.load.client import direct_client
from modalkit.benchmarks.load.processes import run_target

MODES = ("sync", "batch", "ndjson", "async")
OnRun = Callable[[str, Load, float, int, int], object]
"""Told of a run that goes on: its name, the load, the seconds since its begin, the items answered, the failures."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that the loads on a target share."""

    target: Target
    inputs: Inputs
    endpoint: Callable[[str], Endpoint]
    """The endpoint at the address of a target."""
    mode: str = "sync"
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    receiver: Receiver | None = None
    """What reads the queue, in the mode ``async``."""
    repeats: int = 3
    price_per_hour: float | None = None
    start_timeout_s: float
    on_run: OnRun = lambda *_: None

    @contextmanager
    def opened(self, variant: Variant) -> Iterator["OpenSession"]:
        """The target with these settings, once it answers. Raises `BenchError` where it does not."""
        with self.target.started(variant) as running:
            session = OpenSession(self, variant, running)
            session.wait_until_ready()
            yield session


@dataclass
class OpenSession:
    """A target that runs with the settings of one variant."""

    session: Session
    variant: Variant
    running: Running
    cold_start_s: float | None = None

    def wait_until_ready(self) -> None:
        """Wait for the first answer and, of a job, for its delivery. Raises `BenchError`."""
        if self.running.url is not None:
            session = self.session
            self.cold_start_s = first_answer_s(
                self.running,
                self.endpoint,
                session.inputs.items,
                session.start_timeout_s,
                needs_label=session.inputs.labels is not None,
            )
            if session.receiver is not None:
                require_delivery(
                    self.running.url, self.endpoint, session.inputs.items, session.receiver, session.start_timeout_s
                )

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go. Raises `BenchError` for a target without HTTP."""
        if self.running.url is None:
            raise BenchError(f"{self.session.target.name} has no URL")
        if self.session.receiver is not None:
            length = self.session.endpoint(self.running.url).list_length
            jobs = jobs_endpoint(self.running.url, self.session.model, self.session.receiver.queue_name, length)
            return replace(jobs, headers=self.session.headers)
        return self.session.endpoint(self.running.url)

    def measure(self, load: Load, repeats: int | None = None) -> Cell:
        """Put a load on the target, `repeats` times, by default those of the session. Raises `BenchError`."""
        runs: list[Measured] = []
        deliveries: list[Delivery] = []
        sides: list[ServerSide] = []
        wanted = repeats or self.session.repeats
        with gpu_use() as gpus:
            for number in range(wanted):
                name = f"run {number + 1} of {wanted}" if wanted > 1 else "run"
                # Each run has random times of its own, so that the intervals hold their chance, too.
                measured, side = self._run(replace(load, seed=number + 1), name)
                runs.append(measured)
                sides += [] if side is None else [side]
                if self.session.receiver is not None:
                    on_wait = partial(self._tell_deliveries, load, name, measured.begin_s - load.warm_up_s)
                    deliveries.append(wait_for_deliveries(measured, self.session.receiver, on_wait))
        return cell_of(
            load,
            runs,
            variant=self.variant,
            mode=self.session.mode,
            length=1 if self.running.url is None else self.endpoint.list_length,
            sides=sides,
            deliveries=deliveries,
            gpus=gpus.summary([(run.begin_s, run.begin_s + run.elapsed_s) for run in runs]),
            price_per_hour=self.session.price_per_hour,
        )

    def _tell_deliveries(self, load: Load, name: str, began_s: float, delivered: int) -> None:
        self.session.on_run(f"{name}, deliveries", load, perf_counter() - began_s, delivered, 0)

    def _run(self, load: Load, name: str) -> tuple[Measured, ServerSide | None]:
        if self.running.url is None:
            measured = self._send(load, name)
            if measured.setup is None:
                return measured, None
            end_s = measured.begin_s + measured.elapsed_s
            records = [record for at_s, record in measured.kept if measured.begin_s <= at_s <= end_s]
            return measured, of_records(records, measured.setup, measured.elapsed_s, measured.mean_s)
        scrapes = Scrapes(self.running.url, self.session.headers, load.warm_up_s, load.warm_up_s + load.seconds)
        measured = self._send(load, name, scrapes.on_progress)
        is_one_prediction = self.session.receiver is None and self.endpoint.list_length == 1
        mean_s = measured.mean_s if is_one_prediction else None
        return measured, server_side(scrapes.before, scrapes.at_end(), mean_s)

    def _send(self, load: Load, name: str, on_progress: Callable[[float], object] = lambda _: None) -> Measured:
        session = self.session

        def tell(elapsed_s: float, answered: int, failed: int) -> None:
            on_progress(elapsed_s)
            session.on_run(name, load, elapsed_s, answered, failed)

        if isinstance(session.target, WorkerTarget | ModalTarget):
            calls = session.target.calls(session.inputs.items, self.variant)
            return run_target(
                calls,
                load,
                on_progress=tell,
                is_client=isinstance(session.target, ModalTarget),
                start_timeout_s=session.start_timeout_s,
            )
        return run_load(
            self.endpoint,
            session.inputs.items,
            load,
            labels=session.inputs.labels,
            keeps_bodies=session.receiver is not None,
            on_progress=tell,
        )


def cell_of(
    load: Load,
    runs: Sequence[Measured],
    *,
    variant: Variant,
    mode: str,
    length: int = 1,
    sides: Sequence[ServerSide | None] = (),
    deliveries: Sequence[Delivery] = (),
    gpus: Sequence[Mapping[str, Any]] = (),
    price_per_hour: float | None = None,
) -> Cell:
    """The runs of a load, with `length` items in a request, as they are kept."""
    figures = figures_of(runs, deliveries)
    rate = figures.get("delivered_per_s", figures["items_per_s"]).mean
    return Cell(
        variant=variant,
        load=str(load),
        mode=mode + (f" of {length}" if length > 1 else ""),
        open=load.is_open,
        clients=None if load.is_open else load.clients,
        rate_per_s=None if load.rate_per_s is None else load.rate_per_s * length,
        due_per_s=fmean(run.due_per_s for run in runs) * length if load.is_open else None,
        figures=figures,
        answered=sum(run.answered for run in runs),
        errors=errors_of(runs),
        accuracy=None if runs[0].accuracy is None else Figure.of([run.accuracy or 0.0 for run in runs]).mean,
        limited=list(dict.fromkeys(reason for run in runs for reason in run.limited)),
        client={
            "processes": max(run.processes for run in runs),
            "cpu_share": max(run.cpu_share for run in runs),
            "late_p99_ms": 1000 * max(run.late_p99_s for run in runs),
        },
        server=sides[-1] if sides else None,
        delivery=_counts(deliveries) if deliveries else None,
        gpus=gpus,
        cost_per_million=None if price_per_hour is None or not rate else price_per_hour / 3600 / rate * 1e6,
        latency_curve=curve_of(runs),
        timeline=timeline_of(runs[-1]),
        unsteady_runs=sum(not run.was_steady for run in runs) if load.until_steady else 0,
    )


class Scrapes:
    """The metrics of a server when the warm-up is over, and at the end of the measured time."""

    def __init__(self, url: str, headers: Mapping[str, str], warm_up_s: float, end_s: float) -> None:
        self._arguments = url, headers
        self._warm_up_s = warm_up_s
        self._end_s = end_s
        self.before: Any = None
        self._after: Any = None
        self._last_s = -1.0

    def at_end(self) -> Any:
        """The metrics at the end of the measured time; now, where it ended earlier."""
        return scrape(*self._arguments) if self._after is None else self._after

    def on_progress(self, elapsed_s: float) -> None:
        """Keep the metrics once the warm-up is over, and at the end, so many seconds after the begin."""
        last_s, self._last_s = self._last_s, elapsed_s
        begins_anew = elapsed_s < last_s  # with more processes
        if elapsed_s >= self._warm_up_s and (begins_anew or last_s < self._warm_up_s):
            self.before, self._after = scrape(*self._arguments), None
        elif elapsed_s >= self._end_s:
            self._after = scrape(*self._arguments)


def _counts(deliveries: Sequence[Delivery]) -> dict[str, int]:
    names = ("accepted", "delivered", "duplicates", "lost")
    return {name: sum(getattr(delivery, name) for delivery in deliveries) for name in names}


def published_schema(url: str, headers: Mapping[str, str], model: str | None) -> Mapping[str, Any] | None:
    """The JSON schema of an item of a modalkit server; None where it publishes none."""
    try:
        with direct_client(headers=headers, timeout=10) as client:
            return item_schema(client.get(f"{url}/openapi.json").raise_for_status().json(), model)
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None


def item_schema(document: Mapping[str, Any], model: str | None) -> Mapping[str, Any]:
    """The schema of a model's items in an OpenAPI document, by default the first one's, with what it refers to.

    Raises `LookupError`.
    """
    content = document["paths"]["/sync/predict"]["post"]["requestBody"]["content"]
    schema: dict[str, Any] = content["application/json"]["schema"]
    models = schema.get("anyOf", [schema])
    schema = next((one for one in models if one.get("title") == model), models[0])
    definitions = document.get("components", {}).get("schemas", {})
    if "$ref" in schema:
        schema = definitions.get(schema["$ref"].rpartition("/")[2], {})
    return {**schema, "$defs": definitions}
