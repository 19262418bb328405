"""The servers that are compared: how each is started, asked, and set up by its own documentation."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modalkit.benchmarks.bench.targets import MODALKIT
from modalkit.benchmarks.load import Endpoint
from modalkit.benchmarks.peers.environments import python_of
from modalkit.benchmarks.peers.settings import Settings

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SERVERS = "modalkit.benchmarks.peers.servers"
MODEL_FOLDER = Path(__file__).parents[2] / "pipelines" / "sentiment_model"
OURS = "modalkit"
UNBATCHED = "fastapi"

CONFIGURATION = """\
app_settings:
  async_config: {{store_path: jobs.db}}
  queue_config: {{backend: none}}
model_settings:
  model_entries:
    sentiment: {{pipeline: "{pipeline}", model_path: bundled, engine: {engine}, dtype: {dtype}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One server."""

    name: str
    title: str
    package: str
    """The distribution whose version is told."""
    documented: Settings
    """What its documentation recommends for a model like this."""
    source: str
    """Where it does."""
    sweep: tuple[Settings, ...] = ()
    """What else is tried, of which the best is taken."""
    command: Callable[[Settings], list[str]]
    path: str = "/predict"
    body: Any = "$item"
    answer: str = "sentiment"
    variables: Mapping[str, str] | None = None
    runs_own_code: bool = False
    """Whether it runs the model by code of its own, so that no item can be made to fail."""

    def endpoint(self, settings: Settings) -> Endpoint:
        """Where its requests go, at the port of the settings."""
        path = "/predict-async" if settings.option == ASYNC_DEF else self.path
        return Endpoint(url=f"http://127.0.0.1:{settings.port}{path}", body=self.body, answer=self.answer)

    def prepare(self, settings: Settings, folder: Path) -> None:
        """Write what it needs into the folder that it is started in."""
        if self.name == OURS:
            text = CONFIGURATION.format(
                pipeline=f"{SERVERS}.pipeline:Sentiment", engine=settings.engine, dtype=settings.dtype
            )
            (folder / "modalkit.yaml").write_text(text, encoding="utf-8")


def _module(name: str, *arguments: str) -> Callable[[Settings], list[str]]:
    """Starts a module of `servers` in the environment of that name."""
    return lambda settings: [
        str(python_of(name)),
        "-m",
        f"{SERVERS}.{name}_server",
        *(argument.format(port=settings.port) for argument in arguments),
    ]


def _serve_ours(settings: Settings) -> list[str]:
    return [*MODALKIT, "serve", "--port", str(settings.port)]


def _serve_bentoml(settings: Settings) -> list[str]:
    service = f"{SERVERS}.bentoml_server:Sentiments"
    return [str(python_of("bentoml")), "-m", "bentoml", "serve", service, "--port", str(settings.port)]


def _serve_infinity(settings: Settings) -> list[str]:
    options = {
        "model-id": MODEL_FOLDER,
        "served-model-name": "sentiment",
        "engine": "torch",
        "device": "cpu",
        "dtype": settings.dtype,
        "batch-size": settings.batch,
        "host": "127.0.0.1",
        "port": settings.port,
        "log-level": "warning",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(python_of("infinity").parent / "infinity_emb"), "v2", *arguments, *OPTIONS[settings.option]]


def _one_each(batch: int = 1, wait_ms: int = 0, option: str = "") -> Settings:
    """A worker with one thread for each core."""
    return Settings(batch=batch, wait_ms=wait_ms, workers=CORES, threads=1, option=option)


ASYNC_DEF = "async def"
TOKENIZED_LENGTHS = "lengths via tokenizer"
OPTIONS = {"": (), TOKENIZED_LENGTHS: ("--lengths-via-tokenize",)}
CONTENDERS: tuple[Contender, ...] = (
    Contender(
        name="litserve",
        title="LitServe",
        package="litserve",
        documented=Settings(batch=8, wait_ms=100, workers=CORES),
        source="docstrings: LitAPI(max_batch_size=8, batch_timeout=0.1); a worker for each core of a CPU",
        sweep=(
            _one_each(batch=2, wait_ms=5),
            _one_each(batch=8, wait_ms=5),
            _one_each(batch=8, wait_ms=0, option="fast_queue"),
        ),
        command=_module("litserve"),
    ),
    Contender(
        name="mosec",
        title="mosec",
        package="mosec",
        documented=Settings(batch=32, wait_ms=10),
        source="its DistilBERT example: max_batch_size=32, the default wait of 10 ms, one worker",
        sweep=(
            _one_each(batch=2, wait_ms=1),
            _one_each(batch=8, wait_ms=1),
        ),
        command=_module("mosec", "--port", "{port}"),
    ),
    Contender(
        name="ray",
        title="Ray Serve",
        package="ray",
        documented=Settings(batch=8, wait_ms=100),
        source="the guide to dynamic request batching: max_batch_size=8, batch_wait_timeout_s=0.1",
        sweep=(
            _one_each(batch=2, wait_ms=5),
            _one_each(batch=8, wait_ms=5),
        ),
        command=_module("ray"),
        variables={"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    ),
    Contender(
        name="bentoml",
        title="BentoML",
        package="bentoml",
        documented=Settings(batch=32, wait_ms=1_000),
        source="the guide to adaptive batching: max_batch_size=32, max_latency_ms=1000",
        sweep=(
            _one_each(batch=2, wait_ms=60_000),
            _one_each(batch=8, wait_ms=60_000),
        ),
        command=_serve_bentoml,
        body={"inputs": ["$item"]},
        answer="0.sentiment",
        variables={"BENTOML_DO_NOT_TRACK": "true", "BENTOML_HOME": "bentoml"},
    ),
    Contender(
        name="infinity",
        title="Infinity",
        package="infinity_emb",
        documented=Settings(batch=32),
        source="the defaults of its command line",
        sweep=(
            Settings(batch=4),
            Settings(batch=8, option=TOKENIZED_LENGTHS),
        ),
        command=_serve_infinity,
        path="/classify",
        body={"model": "sentiment", "input": ["$text"]},
        answer="data.0.0.label",
        variables={"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "INFINITY_HOME": "."},
        runs_own_code=True,
    ),
    Contender(
        name=UNBATCHED,
        title="FastAPI, unbatched",
        package="fastapi",
        documented=Settings(),
        source="its tutorial: an endpoint by `def`, one worker",
        sweep=(
            _one_each(),
            _one_each(option=ASYNC_DEF),
        ),
        command=_module("fastapi"),
    ),
    Contender(
        name=OURS,
        title="modalkit",
        package="modalkit",
        documented=Settings(batch=32),
        source="its defaults; nothing is tuned",
        command=_serve_ours,
        path="/sync/predict",
    ),
)


def contender(name: str) -> Contender:
    """The contender of that name. Raises `KeyError` if there is none."""
    return {found.name: found for found in CONTENDERS}[name]


def with_best_types(settings: Settings, name: str) -> Settings:
    """The same settings with the engine and number format that are fastest here."""
    engine, dtype = ("torch", "bfloat16") if name == "infinity" else ("auto", "auto")
    return replace(settings, engine=engine, dtype=dtype)
