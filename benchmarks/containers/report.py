"""The results of a matrix as those of ``modalkit bench``: the same page, table, JSON and plots."""

from collections.abc import Iterator, Mapping
from typing import Any

from modalkit.benchmarks.bench.results import Cell as BenchCell
from modalkit.benchmarks.bench.results import Figure, Results, variant_name
from modalkit.benchmarks.bench.server_side import ServerSide
from modalkit.benchmarks.containers.matrix import Cell, VariantResult


def add_variant(results: Results, result: VariantResult) -> None:
    """Add what became of a kind of container: its cells, or why there are none."""
    variant = {"gpu": result.variant.gpu, "max_batch_size": str(result.variant.max_batch_size)}
    results.cells += _cells(variant, result)
    if result.error is None:
        results.cold_start_s[variant_name(variant)] = result.cold_start_s


def _cells(variant: Mapping[str, str], result: VariantResult) -> Iterator[BenchCell]:
    gpus = [] if result.device is None else [{"name": result.device}]
    if result.error is not None:
        yield _cell(variant, 0, {result.error: 1})
    for cell in result.cells:
        if cell.figures is None:
            yield _cell(variant, cell.concurrency, {cell.error or "not measured": 1})
        else:
            yield _cell(variant, cell.concurrency, cell.figures.errors, gpus=gpus, **_measured(cell))


def _cell(variant: Mapping[str, str], callers: int, errors: Mapping[str, int], **measured: Any) -> BenchCell:
    values: dict[str, Any] = {"figures": {"items_per_s": Figure(0.0)}, "answered": 0, "client": {}, **measured}
    return BenchCell(
        variant=variant,
        load=f"{callers} callers" if callers else "start",
        mode="Modal",
        open=False,
        clients=callers,
        rate_per_s=None,
        errors=errors,
        accuracy=None,
        limited=[],
        **values,
    )


def _measured(cell: Cell) -> Mapping[str, Any]:
    found = cell.figures
    if found is None:
        return {}
    latencies_s = {"mean": found.latency_mean_s, "p50": found.latency_p50_s, "p95": found.latency_p95_s}
    latencies_s["p99"] = found.latency_p99_s
    return {
        "figures": {
            "items_per_s": Figure(found.items_per_s),
            **{f"{name}_ms": Figure(1000 * value) for name, value in latencies_s.items()},
        },
        "answered": found.answered,
        "client": {"mean_list_length": found.mean_list_length},
        "server": ServerSide(
            queue_s=found.queue_s,
            stages_s={"batch": found.batch_s},
            rest_s=found.rest_s,
            mean_batch_size=found.mean_batch_size,
            batch_sizes={str(size): count for size, count in found.batch_sizes.items()},
            padding_share=found.padding_share,
            utilisation=found.predict_share,
        ),
        "records": cell.records,
    }
