"""What is kept of a measurement: figures with their confidence intervals, as JSON."""

import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.delivery import Delivery
from modalkit.benchmarks.bench.server_side import ServerSide
from modalkit.benchmarks.load import Measured, OptionError
from modalkit.service.version import VERSION

FORMAT = 1
CURVE_SHARES = (0, 0.01, 0.05, *(round(0.1 * step, 1) for step in range(1, 10)), 0.95, 0.98, 0.99, 0.995, 0.999, 1)
TIMELINE_POINTS = 60
TIMELINE_STEP_S = 0.5
MAX_FAILED_SHARE = 0.01
"""Items that may fail where a latency, or a rate that is kept up with, counts."""
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "uvicorn", "uvloop", "numpy")
# Quantiles of Student's t for 95 %, by the number of runs less one; beyond, that of the normal distribution.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True, slots=True)
class Figure:
    """The mean of the runs, with the 95 % confidence interval of the mean; without one for a single run."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """The figure of these runs."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean)
        t95 = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
        half = t95 * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One load on one variant of the target."""

    variant: Mapping[str, str]
    load: str
    mode: str
    open: bool
    clients: int | None
    rate_per_s: float | None
    """Items per second that were asked for, of an open loop."""
    figures: Mapping[str, Figure]
    """``items_per_s``, latencies of requests as ``p50_ms``, and of jobs ``delivered_per_s`` and ``delivery_p99_ms``."""
    answered: int
    errors: Mapping[str, int]
    """Items without a result, by the reason."""
    accuracy: float | None
    limited: list[str]
    """Why the generator was the limit."""
    client: Mapping[str, float]
    """Of the generator: its processes, the share of a core of the busiest one, and how late requests were sent."""
    due_per_s: float | None = None
    """Items per second that came due, of an open loop: by chance more or fewer than were asked for."""
    server: ServerSide | None = None
    delivery: Mapping[str, int] | None = None
    gpus: Sequence[Mapping[str, Any]] = ()
    cost_per_million: float | None = None
    latency_curve: Sequence[tuple[float, float]] = ()
    """Pairs of a share of the requests and the milliseconds that it did not exceed."""
    timeline: Sequence[tuple[float, float, float, float]] = ()
    """Seconds, and in the time before: items per second, median and 99th percentile in milliseconds."""
    unsteady_runs: int = 0
    """Runs until the throughput is steady in which it never was."""
    records: Sequence[BatchRecord] = ()
    """Those of the batches, where they were asked for."""


@dataclass(kw_only=True)
class Results:
    """Everything that was measured of one target."""

    target: str
    settings: Mapping[str, Any]
    own_capacity: Mapping[str, float] | None = None
    cold_start_s: dict[str, float] = field(default_factory=dict)
    """Seconds from the start of a variant to its first answer."""
    cells: list[Cell] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    cross_check: dict[str, Any] | None = None

    @property
    def limited(self) -> list[str]:
        """The loads in which the generator was the limit, with the reasons."""
        return [f"{name_of(cell)}: {', '.join(cell.limited)}" for cell in self.cells if cell.limited]

    def document(self) -> dict[str, Any]:
        """As plain JSON values, with the machine and the versions."""
        document = {
            "format": FORMAT,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions_of(*PACKAGES),
            "target": self.target,
            "settings": self.settings,
            "own_capacity": self.own_capacity,
            "cold_start_s": self.cold_start_s,
            "cells": self.cells,
            "searches": self.searches,
            "cross_check": self.cross_check,
        }
        plain: dict[str, Any] = from_json(to_json(document, inf_nan_mode="null", serialize_unknown=True))
        return plain


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of modalkit, of Python, and of those of these packages that are installed."""
    versions = {"modalkit": VERSION, "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def machine() -> dict[str, Any]:
    """The processor, the cores, the memory and the system."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def name_of(cell: Cell | Mapping[str, Any]) -> str:
    """A load on a variant, in words."""
    found = cell if isinstance(cell, Mapping) else {name: getattr(cell, name) for name in ("variant", "load", "mode")}
    variant = variant_name(found["variant"])
    return f"{variant + ', ' if found['variant'] else ''}{found['mode']}, {found['load']}"


def failed_share(cell: Mapping[str, Any]) -> float:
    """The share of items without a result; 0 where nothing was sent."""
    answered: int = cell["answered"]
    failed: int = sum(cell["errors"].values())
    return failed / max(1, answered + failed)


def variant_name(variant: Mapping[str, str]) -> str:
    """The settings of a variant, in words."""
    return ", ".join(f"{key} {value}" for key, value in variant.items()) or "as configured"


def figures_of(runs: Sequence[Measured], deliveries: Sequence[Delivery] = ()) -> dict[str, Figure]:
    """The figures of several runs of the same load. What none of them measured is left out."""
    values: dict[str, list[float]] = {
        "items_per_s": [run.items_per_s for run in runs],
        "mean_ms": [1000 * run.mean_s for run in runs],
        **{f"p{share:g}_ms": [1000 * run.latency_s(share / 100) for run in runs] for share in (50, 90, 95, 99)},
        "max_ms": [1000 * run.latency_s(1) for run in runs],
    }
    if deliveries:
        values["delivered_per_s"] = [delivery.delivered_per_s for delivery in deliveries]
        values["delivered_in_time_per_s"] = [delivery.in_time_per_s for delivery in deliveries]
        values["delivery_p50_ms"] = [1000 * delivery.p50_s for delivery in deliveries]
        values["delivery_p99_ms"] = [1000 * delivery.p99_s for delivery in deliveries]
    known = {name: [value for value in found if not math.isnan(value)] for name, found in values.items()}
    return {name: Figure.of(found) for name, found in known.items() if found}


def curve_of(runs: Sequence[Measured]) -> list[tuple[float, float]]:
    """How latencies are distributed, over all runs."""
    latencies_s = np.concatenate([run.latencies_s for run in runs])
    if not len(latencies_s):
        return []
    return list(zip(CURVE_SHARES, (1000 * np.quantile(latencies_s, CURVE_SHARES)).tolist(), strict=True))


def timeline_of(run: Measured) -> list[tuple[float, float, float, float]]:
    """How a run went, in at most 60 parts of equal time, of half a second or more, by what ended in each."""
    points = max(1, min(TIMELINE_POINTS, int(run.elapsed_s / TIMELINE_STEP_S)))
    width_s = run.elapsed_s / points
    ended_s, latencies_s, items = run.ended
    places = np.minimum((ended_s / width_s).astype(int), points - 1)
    rows = []
    for point in range(points):
        is_here = places == point
        found_ms = 1000 * latencies_s[is_here]
        p50, p99 = np.quantile(found_ms, (0.5, 0.99)).tolist() if len(found_ms) else (float("nan"),) * 2
        rows.append(((point + 1) * width_s, float(items[is_here].sum()) / width_s, p50, p99))
    return rows


def errors_of(runs: Sequence[Measured]) -> dict[str, int]:
    """The errors of all runs, the most frequent first."""
    total = Counter[str]()
    for run in runs:
        total.update(run.errors)
    return dict(total.most_common())


def read_document(path: Path) -> dict[str, Any]:
    """Results that were written before. Raises `OptionError` for another file, and ``OSError``."""
    document: Any = None
    with suppress(ValueError):
        document = from_json(path.read_bytes())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise OptionError(f"{path} holds no results of modalkit bench: give the results.json of such a run")
    return document
