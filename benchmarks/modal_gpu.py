"""The service class on several GPU types: ``modal run -m modalkit.benchmarks.modal_gpu``; see the README beside this.

Each GPU type with each batch limit is a variant of the class with one container, which Modal scales apart from the
deployed ones and from all others: what it is put through disturbs no traffic, and none of that is in its figures. The
numbers of callers are measured one after the other in the same container, since each start of a container costs money
and teaches nothing new. The callers are in a function of its own on Modal, without a GPU: from this machine, the way to
Modal would be in every latency. It gathers items into calls by the web function's own code. This machine only says what
to measure, one variant after the other, and writes down what comes back.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal
from rich.console import Console

from modalkit.benchmarks.bench.in_process import MODAL_MODEL
from modalkit.benchmarks.bench.inputs import corpus_inputs
from modalkit.benchmarks.bench.report import show, write_files
from modalkit.benchmarks.bench.results import Results, variant_name
from modalkit.benchmarks.containers.measured import MeasuredService
from modalkit.benchmarks.containers.variants import (
    Matrix,
    Target,
    Variant,
    VariantResult,
    failed_cell,
    measure_variant,
    parse_matrix,
)
from modalkit.service.calls.predictor import MAX_CALLS_IN_FLIGHT
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.engine import ModalEngine

IDLE_S = 20
"""How long a container stays after its last cell: paid for, and of no use."""
LONGEST_S = 24 * 3600
"""Modal's limit; how long a variant is measured, its own limits say."""


modal_config = ModalConfig()
app = modal.App(f"{modal_config.app_name}-benchmark")


@dataclass(frozen=True, slots=True)
class Measured:
    """What is measured: a model of the configuration, or a `MeasuredService` that was deployed."""

    model: str | None = None
    """The model among the parameters of the class, if it has any."""
    app_name: str | None = None
    class_name: str | None = None
    """Of a deployed class; None is the class of this app."""

    def service_cls(self) -> Any:
        """The class of Modal's. Needs neither network nor token before it is called."""
        if self.class_name is None:
            return Model
        return modal.Cls.from_name(self.app_name or modal_config.app_name, self.class_name)


class ModalTarget:
    """An instance of a class of Modal's, opened as an engine."""

    def __init__(self, client: ModalEngine, instance: Any) -> None:
        self.client = client
        self._instance = instance

    async def report(self) -> Any:
        """The report of the container."""
        return await self._instance.batch_report.remote.aio()


def class_settings(config: ModalConfig) -> dict[str, Any]:
    """Arguments of ``app.cls`` for the class of this app: those of the deployed one, and no container is kept warm."""
    return {name: value for name, value in config.get_app_cls_settings().items() if name != "min_containers"}


@app.cls(**class_settings(modal_config))
@modal.concurrent(max_inputs=MAX_CALLS_IN_FLIGHT)
class Model(MeasuredService):
    """The models of the configuration."""

    modal_utils: ModalConfig = modal_config
    model_name: str = modal.parameter(default=next(iter(modal_config.model_settings.model_entries), ""))


def variant_class(service_cls: Any, variant: Variant, config: ModalConfig) -> Any:
    """A class of Modal's as a variant. Needs neither network nor token before it is called."""
    # A variant's env is a secret, and its secrets replace those of the class: both have to be given in full.
    return service_cls.with_options(
        gpu=variant.gpu,
        max_containers=1,
        scaledown_window=IDLE_S,
        env=dict(variant.environment(config.environment)),
        secrets=[modal.Secret.from_name(name) for name in config.app_settings.deployment_config.secrets],
    ).with_concurrency(max_inputs=MAX_CALLS_IN_FLIGHT)


def load_function_settings(config: ModalConfig) -> dict[str, Any]:
    """Arguments of ``app.function`` for where the callers are: the web function's image, settings and region."""
    web = config.get_handler_settings()
    return {name: web[name] for name in ("image", "env", "region") if name in web} | {
        "cpu": 2.0,
        "max_containers": 1,
        "timeout": LONGEST_S,
    }


@app.function(**load_function_settings(modal_config))
async def measure(variant: Variant, matrix: Matrix, measured: Measured) -> VariantResult:
    """Measure one variant from within Modal."""

    @asynccontextmanager
    async def open_variant(variant: Variant) -> AsyncIterator[Target]:
        parameters = {} if measured.model is None else {"model_name": measured.model}
        instance = variant_class(measured.service_cls(), variant, modal_config)(**parameters)

        async def connect() -> Any:
            return instance.process_request

        async with ModalEngine({MODAL_MODEL: connect}) as engine:
            yield ModalTarget(engine, instance)

    return await measure_variant(variant, matrix, open_variant, corpus_inputs().items)


@app.local_entrypoint()
def main(
    gpus: str = "T4,L4,A10G",
    batch_sizes: str = "8,32,128",
    concurrency: str = "64,512",
    seconds: float = 20.0,
    model: str = "",
    output: str = "gpu-matrix",
    records: bool = False,
    app_name: str = "",
    class_name: str = "",
) -> None:
    """Measure all variants, print the figures, and write them and a plot into the folder `output`."""
    matrix = parse_matrix(gpus, batch_sizes, concurrency, seconds, keeps_records=records)
    measured = Measured(model or None, app_name or None, class_name or None)
    name = f"modal:{measured.app_name or modal_config.app_name}/{measured.class_name or Model.__name__}"
    results = Results(target=name, settings={"model": measured.model, "items": "the corpus", "matrix": matrix})
    for variant in matrix.variants:
        print(f"{variant.gpu}, batches of at most {variant.max_batch_size}")
        found = _measured(variant, matrix, measured)
        results.cells += found.cells
        if found.cold_start_s is not None:
            results.cold_start_s[variant_name(variant.settings())] = found.cold_start_s
        # At once, so that a run that is broken off keeps what it has.
        write_files(results.document(), (), Path(output))
    show(results.document(), (), Console(width=160))


def _measured(variant: Variant, matrix: Matrix, measured: Measured) -> VariantResult:
    try:
        return measure.remote(variant, matrix, measured)
    except Exception as error:  # noqa: BLE001  # the other variants are measured all the same
        return VariantResult([failed_cell(variant, "start", error)])
