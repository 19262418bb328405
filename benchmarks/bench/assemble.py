"""From the options of the command: the target, the items, the endpoint, the loads and the variants."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modalkit.benchmarks.bench.delivery import Receiver, receiving
from modalkit.benchmarks.bench.in_process import ModalTarget, WorkerTarget
from modalkit.benchmarks.bench.inputs import (
    Inputs,
    corpus_inputs,
    described_model,
    file_inputs,
    mixed_inputs,
    model_inputs,
    schema_inputs,
    takes_text_alone,
)
from modalkit.benchmarks.bench.session import MODES, OnRun, Session, published_schema
from modalkit.benchmarks.bench.targets import (
    LIMITS,
    SETTINGS,
    ComposeTarget,
    DockerTarget,
    ServeTarget,
    Target,
    UrlTarget,
    Variant,
    variables_of,
)
from modalkit.benchmarks.load import PRESETS, Endpoint, Load, OptionError, preset
from modalkit.benchmarks.load.arrivals import Arrivals, arrival_times
from modalkit.benchmarks.load.endpoint import LINES, model_query
from modalkit.benchmarks.load.plan import values_of
from modalkit.service.cli.common import model_source
from modalkit.service.cli.records import FileFormat
from modalkit.service.settings import Settings
from modalkit.service.validation import documented_model

OURS = "ours"
SERVE, WORKER = "serve", "worker"
CLIENTS = "1,8,64"
"""Those of a closed loop by default."""
LIST_LENGTHS = {"sync": 1, "batch": 32, "ndjson": 1000, "async": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command that say what is measured, by their names in its signature."""

    target: str
    kind: str | None
    body: str | None
    answer: str | None
    header: Sequence[str] | None
    key: str | None
    mode: str
    list_length: int | None
    queue: str | None
    input_path: Path | None
    file_format: FileFormat | None
    column: str | None
    label: str | None
    length_mix: str | None
    samples: bool
    config: Sequence[Path] | None
    model: str | None
    port: int
    docker_argument: Sequence[str] | None
    start_timeout: float
    repeats: int
    price_per_hour: float | None
    sweep: Sequence[str] | None

    @property
    def is_url(self) -> bool:
        """Whether the target is a server that runs already."""
        return self.target.startswith(("http://", "https://"))

    @property
    def is_ours(self) -> bool:
        """Whether the target is a modalkit server, as far as the options tell."""
        return (self.kind or OURS) == OURS and self.body is None and not self._has_path

    @property
    def _has_path(self) -> bool:
        return self.is_url and self.kind is None and urlsplit(self.target).path not in ("", "/")

    @property
    def is_called(self) -> bool:
        """Whether the target is called without HTTP."""
        return self.target == WORKER or self.target.startswith("modal:")

    def all_headers(self) -> dict[str, str]:
        """The headers of each request. Raises `OptionError`."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        for line in self.header or ():
            name, colon, value = line.partition(":")
            if not colon:
                raise OptionError(f"--header {line!r}: give NAME: VALUE")
            headers[name.strip()] = value.strip()
        return headers

    def length(self) -> int:
        """Items of a request."""
        return self.list_length or LIST_LENGTHS[self.mode]

    def check(self) -> None:
        """Raise `OptionError` where options contradict each other."""
        if self.mode not in MODES:
            raise OptionError(f"--mode {self.mode!r}: give one of {', '.join(MODES)}")
        if self.kind is not None and self.kind not in PRESETS:
            raise OptionError(f"--as {self.kind!r}: give one of {', '.join(PRESETS)}, or --body for any other server")
        if self.mode in ("ndjson", "async") and not self.is_ours:
            raise OptionError(f"--mode {self.mode} is for modalkit servers")
        if self.is_called and self.mode != "sync":
            raise OptionError("a worker and a class on Modal are called with one item at a time: leave out --mode")
        if self.mode == "async" and self.target != SERVE and not self.is_url:
            raise OptionError(
                "--mode async measures what serve starts, or a URL: no container is given the queue that bench reads. "
                "Start it with queue_config.backend taskiq and a broker_url, and give its URL and --queue REDIS_URL"
            )
        if self.sweep and self.model is None and self.target not in (SERVE, WORKER) and not self.is_url:
            raise OptionError("--sweep of what is not configured here needs --model, as sentiment for the bundled one")
        if self.label is not None and self.is_called:
            raise OptionError("--label compares answers over HTTP: leave out the target, or give a URL")
        if self.label is not None and self.mode == "async":
            raise OptionError("--label compares answers, and --mode async gets none: leave one of them out")
        if self.label is not None and self.input_path is None:
            raise OptionError("--label names a column of --input FILE")
        self._check_what_counts()
        self.variants()
        if not self.is_called:
            self.endpoint(self.target if self.is_url else "http://127.0.0.1")

    def _check_what_counts(self) -> None:
        """Raise `OptionError` for an option that would change nothing beside the others."""
        if self.input_path is not None and (self.samples or self.length_mix is not None):
            raise OptionError("--input gives the items: leave out --samples and --length-mix")
        if self.samples and self.length_mix is not None:
            raise OptionError("--length-mix and --samples both make items: leave one of them out")
        if self.input_path is None and (self.column is not None or self.file_format is not None):
            raise OptionError("--column and --format are of --input FILE")
        if self.samples and not (self.target in (SERVE, WORKER) or (self.is_url and self.is_ours)):
            raise OptionError("--samples needs a model of this folder or a modalkit server at a URL: give --input")
        if self.kind is not None and self.body is not None:
            raise OptionError("--body is for servers that --as does not know: leave one of them out")
        if self.sweep and (self.kind or OURS) != OURS:
            raise OptionError(f"--sweep sets what a modalkit server reads, and --as {self.kind} is none")
        if self.list_length is not None and self.is_called:
            raise OptionError("a worker and a class on Modal are called with one item at a time: no --list-length")
        if self.queue is not None and self.mode != "async":
            raise OptionError("--queue is of --mode async")
        if self.config and self.target not in (SERVE, WORKER):
            raise OptionError("--config is of what bench starts from this folder: serve, or worker")

    def variants(self) -> list[Variant]:
        """Each combination of the values of each sweep, as ``max_batch_size=8,32``. Raises `OptionError`.

        The value of ``engine`` may have a number format too, as ``torch/float32``.
        """
        known = LIMITS if self.is_url else SETTINGS
        settings = []
        for sweep in self.sweep or ():
            key, _, values = (part.strip() for part in sweep.partition("="))
            if not key or not values:
                raise OptionError(f"--sweep {sweep!r}: give a setting and its values, as max_batch_size=8,32")
            if key not in known:
                raise OptionError(f"--sweep {sweep!r}: {key!r} is no setting; give one of {', '.join(known)}")
            settings.append([_settings(key, value.strip()) for value in values.split(",")])
        return [_variant(list(itertools.chain(*chosen))) for chosen in itertools.product(*settings)]

    def endpoint(self, url: str) -> Endpoint:
        """The endpoint of the target at its address. Raises `OptionError`."""
        if self.body is not None or self._has_path:
            made = Endpoint(self._with_path(url), self._template(), list_length=self.length())
        elif self.mode == "ndjson":
            made = Endpoint(
                f"{url}/batch/predict{model_query(self.model)}",
                answer="sentiment",
                list_length=self.length(),
                content_type=LINES,
                error_mark=b'"status":"error"',
            )
        else:
            made = preset(self.kind or OURS, url, model=self.model, list_length=self.length())
        if self.label is not None and (self.answer or made.answer) is None:
            raise OptionError("--label needs --answer, the path of the label in an answer, as data.0.label")
        return replace(made, answer=self.answer or made.answer, headers=self.all_headers())

    def _with_path(self, url: str) -> str:
        parts = urlsplit(self.target if self.is_url else url)
        return url.rstrip("/") if not self.is_url or not parts.path else self.target

    def _template(self) -> Any:
        if self.body is None:
            return "$item"
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise OptionError(f'--body is not JSON: {error}; as in --body \'{{"text": "$text"}}\'') from None


@contextmanager
def session_of(options: Options, on_run: OnRun) -> Iterator[Session]:
    """The session that the options describe; the queue is read while the block runs. Raises `BenchError`."""
    options.check()
    reading = receiving(options.queue or "webhook") if options.mode == "async" else nullcontext()
    with reading as receiver:
        target, model = _target(options, receiver)
        yield Session(
            target=target,
            inputs=_inputs(options, model),
            endpoint=options.endpoint,
            mode=options.mode,
            model=options.model,
            headers=options.all_headers(),
            receiver=receiver,
            repeats=options.repeats,
            price_per_hour=options.price_per_hour,
            start_timeout_s=options.start_timeout,
            on_run=on_run,
        )


def _target(options: Options, receiver: Receiver | None) -> tuple[Target, str]:
    """The target, and the name of its model."""
    kind, _, rest = options.target.partition(":")
    if options.is_url:
        parts = urlsplit(options.target)
        if not parts.hostname:
            raise OptionError(f"{options.target!r} names no server: give its address, as http://127.0.0.1:8000")
        if "@" in parts.netloc:
            raise OptionError("the target: give a user and password by --header 'Authorization: Basic ...'")
        base = f"{parts.scheme}://{parts.netloc}"
        path = "" if options.body is not None or (not options.is_ours and options.kind is None) else parts.path
        return UrlTarget(base + path.rstrip("/"), options.all_headers(), options.model), options.model or ""
    if kind == "modal":
        app, _, class_name = rest.partition("/")
        if not class_name:
            raise OptionError(f"{options.target!r}: give modal:APP/CLASS, the class that was deployed")
        return ModalTarget(app, class_name, options.model), options.model or ""
    if options.target in (SERVE, WORKER):
        settings = Settings.load(options.config or None)
        model = model_source(settings, options.model).model_name
        for variant in options.variants():
            Settings.load(options.config or None, os.environ | variables_of(variant, model))
        if options.target == WORKER:
            return WorkerTarget(model, tuple(options.config or ())), model
        variables = None if receiver is None else receiver.variables
        return ServeTarget(model, tuple(options.config or ()), variables, options.start_timeout), model
    if kind == "docker" and rest:
        return DockerTarget(rest, options.model or "", options.port, options.docker_argument or ()), ""
    if kind == "compose" or options.target.endswith((".yaml", ".yml")):
        return ComposeTarget(rest or options.target, options.model or "", options.port), ""
    raise OptionError(
        f"{options.target!r} is no target: give a URL (http://HOST:8000), serve, worker, docker:IMAGE, compose:FILE or "
        "modal:APP/CLASS"
    )


def _inputs(options: Options, model: str) -> Inputs:
    if options.input_path is not None:
        return file_inputs(options.input_path, options.file_format, options.column, options.label)
    if options.target not in (SERVE, WORKER):
        schema = None
        if options.is_url and options.is_ours:
            schema = published_schema(options.target.rstrip("/"), options.all_headers(), options.model)
        if schema is None and options.samples:
            raise OptionError(f"{options.target} publishes no schema for --samples: give --input")
        if schema is not None and (options.samples or not takes_text_alone(schema)):
            if options.length_mix is not None:
                raise OptionError("--length-mix makes texts, and this model takes more than a text: give --input")
            return schema_inputs(described_model(schema))
        return mixed_inputs(options.length_mix) if options.length_mix is not None else corpus_inputs()
    source = model_source(Settings.load(options.config or None), model)
    takes_text = takes_text_alone(documented_model(source.input_model).model_json_schema())
    if takes_text and not options.samples and options.length_mix is None:
        return corpus_inputs()
    return model_inputs(options.config or (), model, options.length_mix, options.start_timeout)


def loads_of(base: Load, clients: str | None, rates: str | None, arrivals: str | None) -> list[Load]:
    """A load for each number of clients, or for each rate; or one for a trace. Raises `OptionError`."""
    with_arrivals = replace(base, arrivals=arrivals or Arrivals.POISSON)
    if rates is not None:
        loads = [replace(with_arrivals, rate_per_s=rate) for rate in values_of(rates, float, "--rate", "20,60")]
    elif with_arrivals.is_open:
        loads = [with_arrivals]
    elif arrivals is not None:
        raise OptionError(f"--arrivals {arrivals} is of an open loop: give its --rate")
    else:
        return [replace(base, clients=count) for count in values_of(clients or CLIENTS, int, "--clients", "1,64")]
    if clients is not None:
        raise OptionError("--clients is of closed loops: leave it out, or --rate and the trace of --arrivals")
    if with_arrivals.arrivals not in list(Arrivals):
        for load in loads:
            _check_trace(load)
    return loads


def _check_trace(load: Load) -> None:
    try:
        *_, last_s = arrival_times(load.arrivals, load.rate_per_s)
    except (OSError, ValueError) as error:
        raise OptionError(f"--arrivals: {error}; else give one of {', '.join(Arrivals)}") from error
    if last_s <= load.warm_up_s:
        raise OptionError(f"--arrivals {load}: its {last_s:.3g} s are over within the warm-up; give a lower --warm-up")


def search_load(base: Load, clients: str | None, rates: str | None, arrivals: str | None, *, has_limit: bool) -> Load:
    """The load whose rate is searched. Raises `OptionError`."""
    if rates is not None:
        raise OptionError("--capacity and --p99-ms search the load: leave out --rate")
    if clients is not None:
        raise OptionError("--capacity and --p99-ms search the number of clients: leave out --clients")
    if arrivals is None:
        return base
    if not has_limit:
        raise OptionError("--capacity is searched by closed loops: leave out --arrivals, or give --p99-ms")
    if arrivals not in list(Arrivals):
        raise OptionError(f"--arrivals {arrivals!r}: a search takes {', '.join(Arrivals)}")
    return replace(base, arrivals=arrivals)


def _settings(key: str, value: str) -> list[tuple[str, str]]:
    engine, slash, dtype = value.partition("/")
    return [(key, engine), ("dtype", dtype)] if key == "engine" and slash else [(key, value)]


def _variant(settings: Sequence[tuple[str, str]]) -> Variant:
    variant = dict(settings)
    if len(variant) < len(settings):
        keys = ", ".join(key for key, _ in settings)
        raise OptionError(f"--sweep sets {keys}: give all values of a setting in one --sweep, as max_batch_size=8,32")
    return variant


def as_settings(options: Options, **others: Any) -> Mapping[str, Any]:
    """What the results say of the options; keys, headers and the password of a queue are left out."""
    hidden = ("header", "key")
    given = {name: getattr(options, name) for name in options.__slots__ if name not in hidden}
    if options.queue is not None:
        given["queue"] = re.sub("//.*@", "//", options.queue)
    return {name: value for name, value in (given | others).items() if value not in (None, [], (), False)}
