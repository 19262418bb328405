"""What is measured, and what comes of it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

BATCH_LIMIT_VARIABLE = "MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE"
WARM_UP_S = 3.0


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of container."""

    gpu: str
    max_batch_size: int

    def environment(self, deployed: Mapping[str, str]) -> dict[str, str]:
        """The variables of such a container: those of the deployed ones, with its own batch limit."""
        others = {name: value for name, value in deployed.items() if name.upper() != BATCH_LIMIT_VARIABLE}
        return others | {BATCH_LIMIT_VARIABLE: str(self.max_batch_size)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a container is put through."""

    concurrency: tuple[int, ...]
    """Numbers of callers, one cell each, measured one after the other."""
    duration_s: float = 20.0
    """How long they send, in each cell."""
    warm_up_s: float = WARM_UP_S
    """How long they do before that, uncounted."""
    start_timeout_s: float = 900.0
    """How long the first answer may take, the wait for a GPU and the loading of the model included."""
    drain_timeout_s: float = 120.0
    """How long the last answers of a cell may take."""
    keeps_records: bool = False
    """Whether the record of each batch is part of the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """All cells: each variant under each number of callers."""

    gpus: tuple[str, ...]
    max_batch_sizes: tuple[int, ...]
    load: Load

    def variants(self) -> Iterator[Variant]:
        """Each GPU type with each batch limit."""
        return (Variant(gpu, size) for gpu in self.gpus for size in self.max_batch_sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One cell. What was sent within its time counts, until the last of it was answered; NaN where nothing was."""

    answered: int
    """Items with a result."""
    errors: Mapping[str, int]
    """Items without one, by why."""
    elapsed_s: float
    items_per_s: float
    latency_mean_s: float
    """As a caller sees it, as are the quantiles."""
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float
    queue_s: float
    """Part of the mean latency: an item waits in the container."""
    batch_s: float
    """Part of the mean latency: the item's batch runs, all of its stages."""
    rest_s: float
    """Part of the mean latency: the item is gathered into a list, and on its way there and back."""
    mean_list_length: float
    """Items in a call."""
    mean_batch_size: float
    batch_sizes: Mapping[int, int]
    """How many batches of each size ran."""
    predict_share: float
    """The part of the time that the container's model was running."""
    padding_share: float
    """The part of what the model was given that was padding, by the scheduler's estimates of sizes."""

    @property
    def failed(self) -> int:
        """Items without a result."""
        return sum(self.errors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number of callers, with figures or the reason why there are none."""

    concurrency: int
    figures: Figures | None = None
    error: str | None = None
    records: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantResult:
    """What became of a kind of container: its cells, or the reason why it did not start."""

    variant: Variant
    device: str | None = None
    cold_start_s: float = math.nan
    """Seconds until the first answer, when no container was running."""
    cells: Sequence[Cell] = ()
    error: str | None = None
    versions: Mapping[str, str] | None = None
    """Of the packages where the load came from, which share the container's image."""


def parse_matrix(gpus: str, batch_sizes: str, concurrency: str, seconds: float, *, keeps_records: bool) -> Matrix:
    """The matrix that a command's options name, each a list with commas. Raises `ValueError`, with the option."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds {seconds:g}: give how long callers send in each cell, more than 0")
    return Matrix(
        gpus=_each(gpus, _name, "--gpus", "names of GPUs, as T4,L4"),
        max_batch_sizes=_each(batch_sizes, _count, "--batch-sizes", "numbers from 1, as 8,32"),
        load=Load(
            concurrency=_each(concurrency, _count, "--concurrency", "numbers from 1, as 64,512"),
            duration_s=seconds,
            warm_up_s=min(WARM_UP_S, seconds),
            keeps_records=keeps_records,
        ),
    )


def _name(text: str) -> str:
    if not text:
        raise ValueError("one of the names is empty")
    return text


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def _each(text: str, read: Callable[[str], T], option: str, expected: str) -> tuple[T, ...]:
    try:
        return tuple(dict.fromkeys(read(part.strip()) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {error}; give {expected}") from error
