"""The deployed class on several GPU types: ``modal run -m modalkit.benchmarks.modal_gpu``; see the README beside this.

Each GPU type with each batch limit is a variant of the class with one container, which Modal scales apart from the
deployed ones and from all others: what it is put through disturbs no traffic, and none of that is in its figures. The
numbers of callers are measured one after the other in the same container, since each start of a container costs money
and teaches nothing new. The callers are in a function of its own on Modal, without a GPU: from this machine, the way to
Modal would be in every latency. It gathers items into lists by the web function's own code. This machine only says what
to measure, one variant after the other, and writes down what comes back.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal
from rich.console import Console

from modalkit.benchmarks.containers.load import Target, measure_variant
from modalkit.benchmarks.containers.matrix import Load, Variant, VariantResult, parse_matrix
from modalkit.benchmarks.containers.report import Results
from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.service.errors import describe_error
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.lists import LISTS_IN_FLIGHT
from modalkit.service.on_modal.remote import ModalRemoteService, RemoteService

IDLE_S = 20
"""How long a container stays after its last cell: paid for, and of no use."""
LONGEST_S = 24 * 3600
"""Modal's limit; how long a variant is measured, its own limits say."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A class that was deployed, and the model among its parameters, if it has any."""

    app_name: str
    class_name: str
    model: str | None


class ModalTarget:
    """An instance of a class of Modal's."""

    def __init__(self, instance: Any) -> None:
        self.remote: RemoteService = ModalRemoteService(instance.process_request)
        self._instance = instance

    async def report(self) -> Any:
        """See `Target.report`."""
        return await self._instance.batch_report.remote.aio()


def variant_class(deployed: Deployed, variant: Variant, config: ModalConfig) -> Any:
    """The deployed class as a variant. Needs neither network nor token before it is called."""
    # A variant's env is a secret, and its secrets replace those of the class: both have to be given in full.
    return (
        modal.Cls.from_name(deployed.app_name, deployed.class_name)
        .with_options(
            gpu=variant.gpu,
            max_containers=1,
            scaledown_window=IDLE_S,
            env=dict(variant.environment(config.environment)),
            secrets=[modal.Secret.from_name(name) for name in config.app_settings.deployment_config.secrets],
        )
        .with_concurrency(max_inputs=LISTS_IN_FLIGHT)
    )


modal_config = ModalConfig()
app = modal.App(f"{modal_config.app_name}-benchmark")


def load_function_settings(config: ModalConfig) -> dict[str, Any]:
    """Arguments of ``app.function`` for where the callers are: the web function's image, settings and region."""
    web = config.get_handler_settings()
    return {name: web[name] for name in ("image", "env", "region") if name in web} | {
        "cpu": 2.0,
        "max_containers": 1,
        "timeout": LONGEST_S,
    }


@app.function(**load_function_settings(modal_config))
async def measure(variant: Variant, load: Load, deployed: Deployed) -> VariantResult:
    """Measure one variant from within Modal."""

    @asynccontextmanager
    async def open_variant(variant: Variant) -> AsyncIterator[Target]:
        parameters = {} if deployed.model is None else {"model_name": deployed.model}
        yield ModalTarget(variant_class(deployed, variant, modal_config)(**parameters))

    return await measure_variant(variant, load, open_variant, mixed_length_texts())


@app.local_entrypoint()
def main(
    gpus: str = "T4,L4,A10G",
    batch_sizes: str = "8,32,128",
    concurrency: str = "64,512",
    seconds: float = 20.0,
    model: str = "",
    output: str = "gpu-matrix",
    records: bool = False,
    app_name: str = modal_config.app_name,
    class_name: str = "Model",
) -> None:
    """Measure all variants, print the figures, and write them and a plot into the folder `output`."""
    matrix = parse_matrix(gpus, batch_sizes, concurrency, seconds, keeps_records=records)
    deployed = Deployed(app_name, class_name, model or None)
    results = Results(matrix, {"app": app_name, "class": class_name, "model": deployed.model}, Path(output))
    for variant in matrix.variants():
        print(f"{variant.gpu}, batches of at most {variant.max_batch_size}")
        results.add(_measured(variant, matrix.load, deployed))
    results.print(Console(width=120))


def _measured(variant: Variant, load: Load, deployed: Deployed) -> VariantResult:
    try:
        return measure.remote(variant, load, deployed)
    except Exception as error:  # noqa: BLE001  # the other variants are measured all the same
        return VariantResult(variant=variant, error=describe_error(error))
