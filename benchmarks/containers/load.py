"""Puts load on a container, the way the web function does, and collects what it tells of its batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from importlib.metadata import version
from typing import Any, Protocol

import anyio
import modal
from pydantic import BaseModel, TypeAdapter

from modalkit.benchmarks.containers.figures import Answers, Report, UnmeasurableError, figures_of
from modalkit.benchmarks.containers.matrix import Cell, Load, Variant, VariantResult
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.calls.engine import CallClient, CallOptions
from modalkit.service.calls.predictor import CallModel
from modalkit.service.calls.wire_format import read_outcome
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig
from modalkit.service.version import VERSION

ERRORS_IN_A_ROW = 5
"""After so many a caller gives up: what refuses everything at once would be asked without end."""
SHOWN_OF_AN_ERROR = 300
MODEL = "the measured model"
"""What calls name it; a target has one model."""
MODEL_LIBRARIES = ("torch", "transformers")


class Target(Protocol):
    """A container, or what stands in for one, that has no other caller."""

    @property
    def client(self) -> CallClient:
        """What calls it."""
        ...  # a protocol method has no body

    async def report(self) -> Mapping[str, Any]:
        """What `MeasuredService.batch_report` returns."""
        ...


OpenTarget = Callable[[Variant], AbstractAsyncContextManager[Target]]


class TextItem(BaseModel):
    """What is sent: the message of every model that reads a text."""

    text: str


async def measure_variant(variant: Variant, load: Load, open_target: OpenTarget, texts: Sequence[str]) -> VariantResult:
    """Start a container, and measure its cells one after the other.

    What fails is told in the result: a container that does not start, or a cell.
    """
    items = itertools.cycle([TextItem(text=text) for text in texts])
    # Modal gives its client to a container as files, without the record of a distribution.
    versions = {"modalkit": VERSION, "modal": modal.__version__, **{name: version(name) for name in MODEL_LIBRARIES}}
    started_s = anyio.current_time()
    try:
        async with open_target(variant) as target:
            with _at_most(load.start_timeout_s, "there was no answer"):
                await _first_answer(target, next(items))
                cold_start_s = anyio.current_time() - started_s
                device = (await _report(target)).device
            cells = [await _cell(target, variant, load, concurrency, items) for concurrency in load.concurrency]
    except Exception as error:  # noqa: BLE001  # the other variants are measured all the same
        return VariantResult(variant=variant, error=describe_error(error), versions=versions)
    return VariantResult(variant=variant, device=device, cold_start_s=cold_start_s, cells=cells, versions=versions)


async def _first_answer(target: Target, item: TextItem) -> None:
    """Raises what the item failed with: all others are like it."""
    for outcome in map(read_outcome, await target.client.call(MODEL, [{"message": item.model_dump()}], CallOptions())):
        if isinstance(outcome, Exception):
            raise outcome


async def _cell(target: Target, variant: Variant, load: Load, concurrency: int, items: Iterator[TextItem]) -> Cell:
    try:
        with _at_most(load.warm_up_s + load.duration_s + load.drain_timeout_s, "not everything was answered"):
            await send(target.client, variant.max_batch_size, items, concurrency, load.warm_up_s)
            before = await _report(target)
            answers = await send(target.client, variant.max_batch_size, items, concurrency, load.duration_s)
            report = await _report(target)
        if not answers.latencies_s:
            why = max(answers.errors, key=answers.errors.__getitem__, default="there was no time")
            return Cell(concurrency=concurrency, error=f"nothing succeeded: {why}")
        figures = figures_of(answers, before.statistics, report)
    except Exception as error:  # noqa: BLE001  # the other cells are measured all the same
        return Cell(concurrency=concurrency, error=describe_error(error))
    records = report.records if load.keeps_records else []
    return Cell(concurrency=concurrency, figures=figures, records=records)


async def send(
    client: CallClient, max_batch_size: int, items: Iterator[TextItem], concurrency: int, duration_s: float
) -> Answers:
    """Keep `concurrency` items in flight for so long, gathered into calls, and wait for the last of them."""
    answers = Answers()
    config = BatchConfig(max_batch_size=max_batch_size, max_queue_size=max(concurrency, max_batch_size))
    model = CallModel(MODEL, client, config, input_model=TextItem, output_model=InferenceOutputModel)
    async with model:
        started_s = anyio.current_time()

        async def call() -> None:
            in_a_row = 0
            while in_a_row < ERRORS_IN_A_ROW and (sent_s := anyio.current_time()) < started_s + duration_s:
                try:
                    await model.predict(next(items))
                except Exception as error:  # noqa: BLE001  # counted
                    answers.errors[describe_error(error)[:SHOWN_OF_AN_ERROR]] += 1
                    in_a_row += 1
                else:
                    answers.latencies_s.append(anyio.current_time() - sent_s)
                    in_a_row = 0

        async with anyio.create_task_group() as task_group:
            for _ in range(concurrency):
                task_group.start_soon(call)
        answers.elapsed_s = anyio.current_time() - started_s
        answers.mean_list_length = model.statistics().mean_batch_size
    return answers


_REPORT = TypeAdapter(Report)


async def _report(target: Target) -> Report:
    return _REPORT.validate_python(await target.report())


@contextmanager
def _at_most(timeout_s: float, otherwise: str) -> Iterator[None]:
    with anyio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise UnmeasurableError(f"{otherwise} within {timeout_s:g} s")
