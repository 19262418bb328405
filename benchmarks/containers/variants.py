"""Kinds of containers, and what is measured of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import anyio

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.in_process import MODAL_MODEL, calling
from modalkit.benchmarks.bench.results import Cell, Figure
from modalkit.benchmarks.bench.server_side import Setup, of_records
from modalkit.benchmarks.bench.session import cell_of
from modalkit.benchmarks.containers.measured import KEPT_RECORDS
from modalkit.benchmarks.load import BenchError, Load, Measured, OptionError
from modalkit.benchmarks.load.plan import values_of
from modalkit.benchmarks.load.processes import measure_here
from modalkit.service.calls.engine import CallClient, CallOptions
from modalkit.service.calls.wire_format import read_outcome
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig

BATCH_LIMIT_VARIABLE = "MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE"
WARM_UP_S = 3.0
START_TIMEOUT_S = 900.0
"""How long the first answer may take, the wait for a GPU and the loading of the model included."""
DRAIN_TIMEOUT_S = 120.0
"""How long the last answers of a cell may take."""
MODE = "Modal"

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of container."""

    gpu: str
    max_batch_size: int

    def environment(self, deployed: Mapping[str, str]) -> dict[str, str]:
        """The variables of such a container: those of the deployed ones, with its own batch limit."""
        others = {name: value for name, value in deployed.items() if name.upper() != BATCH_LIMIT_VARIABLE}
        return others | {BATCH_LIMIT_VARIABLE: str(self.max_batch_size)}

    def settings(self) -> dict[str, str]:
        """As in results."""
        return {"gpu": self.gpu, "max_batch_size": str(self.max_batch_size)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Each variant is measured under each load."""

    variants: Sequence[Variant]
    loads: Sequence[Load]
    keeps_records: bool = False
    """Whether the record of each batch is part of the results."""


def parse_matrix(gpus: str, batch_sizes: str, concurrency: str, seconds: float, *, keeps_records: bool) -> Matrix:
    """The matrix that a command's options name, each a list with commas. Raises `OptionError`, with the option."""
    base = Load(seconds=seconds, warm_up_s=min(WARM_UP_S, seconds))
    names = [name.strip() for name in gpus.split(",")]
    if not all(names):
        raise OptionError(f"--gpus {gpus!r}: give names of GPUs, as T4,L4")
    sizes = values_of(batch_sizes, int, "--batch-sizes", "8,32")
    return Matrix(
        variants=[Variant(gpu, size) for gpu in dict.fromkeys(names) for size in dict.fromkeys(sizes)],
        loads=[replace(base, clients=count) for count in values_of(concurrency, int, "--concurrency", "64,512")],
        keeps_records=keeps_records,
    )


class Target(Protocol):
    """A container, or what stands in for one, that has no other caller."""

    @property
    def client(self) -> CallClient:
        """What calls it."""
        ...  # a protocol method has no body

    async def report(self) -> tuple[str, Setup, Sequence[BatchRecord]]:
        """What `MeasuredService.batch_report` returns."""
        ...


OpenTarget = Callable[[Variant], AbstractAsyncContextManager[Target]]


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What became of a kind of container: its cells, one with an error where it did not start."""

    cells: Sequence[Cell]
    cold_start_s: float | None = None
    """Seconds until the first answer, when no container was running."""


async def measure_variant(
    variant: Variant, matrix: Matrix, open_target: OpenTarget, items: Sequence[Item]
) -> VariantResult:
    """Start a container, and measure each load, one after the other. What fails is told in the cells."""
    started_s = perf_counter()
    try:
        async with open_target(variant) as target:
            with _within(START_TIMEOUT_S, "there was no answer"):
                await _first_answer(target, items[0])
                cold_start_s = perf_counter() - started_s
            cells = [await _cell(target, variant, load, items, matrix) for load in matrix.loads]
    except Exception as error:  # noqa: BLE001  # the other variants are measured all the same
        return VariantResult([failed_cell(variant, "start", error)])
    return VariantResult(cells, cold_start_s)


def failed_cell(variant: Variant, load: str, error: Exception) -> Cell:
    """A cell without figures."""
    why = describe_error(error)
    return Cell(
        variant=variant.settings(), load=load, mode=MODE, open=False, clients=None, rate_per_s=None,
        figures={"items_per_s": Figure(0.0)}, answered=0, errors={why: 1}, accuracy=None, limited=[], client={},
    )  # fmt: skip


async def _first_answer(target: Target, item: Item) -> None:
    """Raises what the item failed with: all others are like it."""
    for outcome in map(read_outcome, await target.client.call(MODAL_MODEL, [{"message": item}], CallOptions())):
        if isinstance(outcome, Exception):
            raise outcome


async def _cell(target: Target, variant: Variant, load: Load, items: Sequence[Item], matrix: Matrix) -> Cell:
    config = BatchConfig(
        max_batch_size=variant.max_batch_size, max_queue_size=max(load.clients, variant.max_batch_size)
    )
    try:
        with _within(load.warm_up_s + load.seconds + DRAIN_TIMEOUT_S, "not everything was answered"):
            async with calling(target.client, items, config) as call:
                await measure_here(call, replace(load, seconds=load.warm_up_s))
                await target.report()
                measured = await measure_here(call, load)
            device, setup, records = await target.report()
        _check(measured, records)
    except Exception as error:  # noqa: BLE001  # the other cells are measured all the same
        return failed_cell(variant, str(load), error)
    side = of_records(records, setup, measured.elapsed_s, measured.mean_s)
    cell = cell_of(load, [measured], variant=variant.settings(), mode=MODE, sides=[side], gpus=[{"name": device}])
    return replace(cell, records=records if matrix.keeps_records else ())


@contextmanager
def _within(timeout_s: float, otherwise: str) -> Iterator[None]:
    with anyio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise BenchError(f"{otherwise} within {timeout_s:g} s")


def _check(measured: Measured, records: Sequence[BatchRecord]) -> None:
    """Raise `BenchError` where nothing succeeded, or the batches are not those of the container that was asked."""
    if not measured.answered:
        raise BenchError(f"nothing succeeded: {next(iter(measured.errors), 'there was no time')}")
    if sum(record.count for record in records) < measured.answered and len(records) < KEPT_RECORDS:
        raise BenchError("another container than the one that was asked ran batches; measure it again")
