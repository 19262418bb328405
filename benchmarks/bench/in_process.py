"""Models without HTTP: a worker in the process of the load generator, and a class that was deployed on Modal."""

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import BaseModel

from modalkit.batching import BatchRecord
from modalkit.benchmarks.bench.server_side import Setup
from modalkit.benchmarks.bench.targets import Running, Variant, variables_of
from modalkit.benchmarks.load.client import Outcome
from modalkit.benchmarks.load.loops import Call
from modalkit.pipelines import InferenceOutputModel
from modalkit.service.calls.engine import CallClient
from modalkit.service.errors import describe_error
from modalkit.service.settings import BatchConfig, Settings

MODAL_MODEL = "the measured model"

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerTarget:
    """A worker in the process that sends, without HTTP."""

    model: str
    config: tuple[Path, ...] = ()
    items: Sequence[Item] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    name: str = "worker"

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:  # noqa: ARG002  # the worker starts with its calls
        """Nothing runs yet."""
        yield Running(None, perf_counter())

    def calls(self, items: Sequence[Item], variant: Variant) -> "WorkerTarget":
        """What the load generator's process opens."""
        return replace(self, items=items, variables=variables_of(variant, self.model))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Call]:
        """Load the model, and call its worker."""
        from modalkit.service.cli.common import model_source
        from modalkit.service.jobs import MemoryJobStore
        from modalkit.service.worker import InferenceWorker

        settings = Settings.load(self.config or None, os.environ | self.variables)
        source = model_source(settings, self.model)
        call = ItemCall(self.items)
        async with InferenceWorker(
            source.load(),
            settings=source.settings,
            job_store=MemoryJobStore(),
            input_model=source.input_model,
            on_batch=call.add_batch,
        ) as worker:
            call.predict, call.setup = worker.predict, Setup.of(worker)
            yield call


@dataclass
class ItemCall:
    """Predicts items by their index, and keeps the records of the batches."""

    items: Sequence[Item]
    predict: Any = None
    kept: list[tuple[float, BatchRecord]] = field(default_factory=list)
    """The records of batches, each with the time of its end, by `time.perf_counter`."""
    setup: Setup | None = None
    """What runs them; None where it is elsewhere."""

    def add_batch(self, record: BatchRecord) -> None:
        """Keep a record, without its errors, whose classes another process may not know."""
        self.kept.append((perf_counter(), replace(record, errors=())))

    async def __call__(self, index: int) -> Outcome:
        """Predict one item."""
        try:
            await self.predict(self.items[index % len(self.items)])
        except Exception as error:  # noqa: BLE001  # counted
            return describe_error(error)[:300]
        return 1


class _Item(BaseModel, extra="allow"):
    """The message of any model."""


@dataclass(frozen=True, slots=True)
class ModalTarget:
    """A class that is deployed on Modal, called from this machine as the web function calls it: ``modal:APP/CLASS``."""

    app: str
    class_name: str
    model: str | None = None
    items: Sequence[Item] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"modal:{self.app}/{self.class_name}"

    @contextmanager
    def started(self, variant: Variant) -> Iterator[Running]:  # noqa: ARG002  # Modal starts containers for calls
        """Nothing is started here."""
        yield Running(None, perf_counter())

    def calls(self, items: Sequence[Item], variant: Variant) -> "ModalTarget":
        """What the load generator's process opens."""
        return replace(self, items=items, variables=variables_of(variant, self.model or ""))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Call]:
        """Look the class up, with the variables of a variant as its environment."""
        import modal

        from modalkit.service.on_modal.engine import ModalEngine

        service_cls: Any = modal.Cls.from_name(self.app, self.class_name)
        if self.variables:
            service_cls = service_cls.with_options(env=dict(self.variables))
        instance = service_cls(**({} if self.model is None else {"model_name": self.model}))

        async def connect() -> Any:
            return instance.process_request

        async with ModalEngine({MODAL_MODEL: connect}) as engine, calling(engine, self.items, BatchConfig()) as call:
            yield call


@asynccontextmanager
async def calling(client: CallClient, items: Sequence[Item], config: BatchConfig) -> AsyncIterator[ItemCall]:
    """What gathers items into calls of the one model behind a client, as the web function does."""
    from modalkit.service.calls.predictor import CallModel

    call = ItemCall(items)
    async with CallModel(MODAL_MODEL, client, config, input_model=_Item, output_model=InferenceOutputModel) as model:

        async def predict(item: Item) -> Any:
            return await model.predict(_Item.model_validate(item))

        call.predict = predict
        yield call
