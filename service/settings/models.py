"""The sections below `app_settings`: one frozen model for each concern; `BatchPolicy` has the defaults for batches.

The text below a field says what the setting does and what follows from it. Nothing here reads files or variables.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from modalkit.batching import BatchPolicy
from modalkit.service.settings.deployment import BuildConfig, DeploymentConfig
from modalkit.service.settings.fields import (
    AppPrefix,
    Backend,
    Count,
    Duration,
    HeaderName,
    Host,
    KeyName,
    Lifetime,
    NonEmpty,
    PerSecond,
    Secret,
    StorePath,
    Wait,
    refusal,
)
from modalkit.service.settings.section import Section
from modalkit.service.settings.server import ServerConfig

Adapter = Literal["openai", "tei", "vllm"]
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)

_LIMITS = BatchPolicy()


class KeyScope(StrEnum):
    """What a key may be used for."""

    PREDICT = "predict"
    """Predictions that the caller waits for."""
    JOBS = "jobs"
    """Submitting jobs, and reading, cancelling and replaying those of the same key."""
    METRICS = "metrics"
    """Reading `/metrics`, where that needs a key."""
    ADMIN = "admin"
    """Everything: also the jobs of other keys, and what changes the service itself."""


class KeyConfig(Section):
    """One of several keys: where it is, what it may be used for, and how much."""

    api_key: Secret | None = None
    """The key itself, or `sha256:` and the 64 hexadecimal digits of its SHA-256."""
    file: NonEmpty | None = None
    """File that holds the key, in place of `api_key`; it is read at start."""
    ssm_key: NonEmpty | None = None
    """Name of the AWS SSM parameter that holds the key, in place of `api_key`."""
    scopes: Annotated[list[KeyScope], Field(min_length=1)] = [KeyScope.PREDICT, KeyScope.JOBS]
    """What the key may be used for: predict, jobs, metrics; admin includes all of them."""
    max_requests_per_second: PerSecond | None = None
    """Requests per second, with bursts of one second; further ones are refused (HTTP 429); null sets no limit."""
    max_items_per_second: PerSecond | None = None
    """Items and jobs per second, likewise; streams are read no faster."""
    max_requests_in_flight: Count | None = None
    """Requests of the key that are answered at a time; further ones are refused (HTTP 429); null sets no limit."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        # Without any, the service does not start; others that read its settings need not have its secrets.
        if sum(place is not None for place in (self.api_key, self.file, self.ssm_key)) > 1:
            raise refusal("give the key in one of api_key, file and ssm_key")
        return self


class AuthConfig(Section):
    """Who may call the service."""

    api_key: Secret | None = None
    """Callers must send this key; with null, and without `keys`, no key is asked for. It may be used for everything."""
    ssm_key: NonEmpty | None = None
    """Name of the AWS SSM parameter that holds the key, in place of `api_key`; its value is decrypted."""
    ssm_region: NonEmpty | None = None
    """AWS region of all such parameters; null takes it from the environment."""
    ssm_refresh_seconds: Duration = 300
    """Seconds between two reads of the parameter; a new key works at once, the old one until the next read."""
    auth_header: HeaderName = "authorization"
    """The request header that carries the key; `authorization` expects `Bearer <key>`."""
    keys: dict[KeyName, KeyConfig] = {}
    """Further keys by name. Jobs belong to the name of the key that made them; other keys do not see them."""
    max_wrong_keys_per_minute: Count | None = 60
    """Wrong keys from one address in a minute; further ones get HTTP 429, after a second; null: no limit."""
    open_metrics: bool = True
    """Whether `/metrics` needs no key; false: a key with the scope `metrics`."""
    insecure: bool = False
    """Whether `modalkit serve` may listen without a key on an address that other machines can reach."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.ssm_key is not None:
            raise refusal("api_key is given as well, and only one of them can hold: set the other to null", "ssm_key")
        return self

    @property
    def asks_for_key(self) -> bool:
        """Whether any key is configured."""
        return self.api_key is not None or self.ssm_key is not None or bool(self.keys)

    @property
    def uses_ssm(self) -> bool:
        """Whether any key is in AWS SSM."""
        return self.ssm_key is not None or any(key.ssm_key is not None for key in self.keys.values())


class CalibrationConfig(Section):
    """How the scheduler learns at start how long batches take."""

    enabled: bool = True
    """Measure a few batches of made-up items at start; false: the first real batches teach the scheduler."""
    max_seconds: Duration = 3
    """Maximum seconds that measuring takes."""
    path: Path | None = None
    """File that keeps the measured costs between starts, for each model and device; null: measure at each start."""


class BatchConfig(Section):
    """The limits within which the scheduler forms batches."""

    max_batch_size: Count = _LIMITS.max_batch_size
    """Maximum items in one batch; more use a GPU better and need more memory."""
    wait_ms: Wait = round(1000 * _LIMITS.max_wait_s)
    """Maximum milliseconds that an idle worker waits for a fuller batch, where measured costs say that it pays."""
    max_batch_tokens: Count | None = _LIMITS.max_batch_tokens
    """Maximum tokens in one batch, padding included, which limits its memory; null sets no limit."""
    max_batch_seconds: Duration | None = _LIMITS.max_batch_s
    """Maximum predicted seconds of one batch, which limits how long requests wait behind it; null sets no limit."""
    max_in_flight: Annotated[Count, Field(le=1024)] | None = None
    """Batches of a model that run at once; null: as many as its pipeline says, which is 1 unless its class has more."""
    max_queue_size: Count = _LIMITS.max_queue_items
    """Maximum waiting requests; further ones are refused (HTTP 429)."""
    max_queue_seconds: Duration | None = _LIMITS.max_queue_s
    """Maximum predicted seconds of what waits before a new request over HTTP; beyond, it gets a 429; null: no limit."""
    max_age_ms: Wait = round(1000 * _LIMITS.max_age_s)
    """Age in milliseconds past which the oldest request goes into the next batch, whatever its size."""
    max_bulk_batch_ms: Literal["auto"] | Duration = "auto"
    """Maximum predicted milliseconds of a batch of jobs while single requests arrive; auto: jobs lose at most 3 %."""
    batch_timeout_seconds: Duration = 120
    """Seconds after which a batch counts as hanging: its items run again, each alone; those that hang again fail."""
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def _a_batch_fits_the_queue(self) -> Self:
        self.require_at_most("max_batch_size", "max_queue_size", ", so no batch could ever fill")
        return self


class RequestConfig(Section):
    """The limits of HTTP requests, which bound what they cost in memory and how long others wait for them."""

    max_body_bytes: Count = 32 * 2**20
    """Maximum bytes of a body; a larger one is refused (HTTP 413). A stream of lines (NDJSON) may have any length."""
    max_line_bytes: Count = 2**20
    """Maximum bytes of a line of a stream; a longer one is refused alone (413 in its place)."""
    max_file_bytes: Count = 200 * 2**20
    """Maximum bytes of a file for a batch in the shape of OpenAI's; a larger one is refused (HTTP 413)."""
    max_stored_file_bytes: Count = 2 * 2**30
    """Maximum bytes of all such files that are stored; beyond, another one is refused (HTTP 507)."""
    max_items: Count = 10_000
    """Maximum items of a list; a longer one is refused (HTTP 413)."""
    max_item_bytes: Count = 16 * 2**20
    """Maximum bytes of one item; a larger one is refused (HTTP 413)."""
    max_item_values: Count = 100_000
    """Maximum brackets and commas of one item: many small values cost more than one long text (HTTP 413)."""
    max_pending_bytes: Count = 256 * 2**20
    """Maximum bytes of bodies that arrive or wait and answers that are sent, beyond 64 KiB each; beyond, HTTP 503."""


class SqsConfig(Section):
    """Amazon SQS, for `backend: sqs`."""

    region: NonEmpty | None = None
    """AWS region; null takes it from the environment."""
    endpoint_url: NonEmpty | None = None
    """Another server that speaks SQS; null means AWS."""
    create_missing_queues: bool = False
    """Create a named queue that does not exist; otherwise its results stay undelivered."""
    message_group_id: NonEmpty | None = None
    """Message group in FIFO queues; null gives each message its own group: full throughput, no order."""


class WebhookConfig(Section):
    """HTTP deliveries, for `backend: webhook`: the queue's name is the URL."""

    allowed_hosts: list[Host] = []
    """Hosts that results may be sent to; every other URL is refused."""
    secret: Secret | None = None
    """Key that signs each delivery (HMAC-SHA256); null sends them unsigned."""
    allow_private_addresses: bool = False
    """Send to private addresses and by plain http too: for receivers in your own network."""


class QueueConfig(Section):
    """Where the results of asynchronous jobs are sent."""

    backend: Backend = "memory"
    """none, memory, sqs, taskiq, webhook, routing, or "module:Class" for one of your own."""
    # repr=False: the URL may carry a password.
    broker_url: Annotated[str, Field(min_length=1, repr=False)] = "redis://localhost:6379"
    """The broker for `backend: taskiq`."""
    sqs: SqsConfig = SqsConfig()
    webhook: WebhookConfig = WebhookConfig()
    routes: dict[NonEmpty, Backend] = {}
    """For `backend: routing`, as pattern of queue names: backend; the first pattern that matches is used."""
    allowed_queues: list[NonEmpty] = ["*"]
    """Patterns of the queue names that callers may give; all others are refused."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.backend == "routing" and not self.routes:
            raise refusal('backend routing needs at least one route, as in "ml_*": taskiq', "routes")
        if self.backend != "routing" and self.routes:
            raise refusal(
                f"only backend routing uses routes, and backend is {self.backend}: choose it, or remove them",
                "routes",
            )
        for pattern, backend in self.routes.items():
            if backend == "routing":
                raise refusal("a route cannot lead to routing: name the backend itself", "routes", pattern)
        if "webhook" in (self.backend, *self.routes.values()) and not self.webhook.allowed_hosts:
            raise refusal(
                "the webhook backend sends to no host that is not listed: list at least one, as in [hooks.example.com]",
                "webhook",
                "allowed_hosts",
            )
        return self


class AsyncConfig(Section):
    """Asynchronous jobs: how long they live and where they are kept."""

    timeout: Lifetime = 3600
    """Seconds that a job may take after it first ran; then it expires."""
    max_attempts: Count = 5
    """Attempts for a job whose whole batch fails, or that fails by a retryable error; 5 take 85 s or more."""
    result_ttl: Lifetime = 86_400
    """Seconds for which a finished job is kept; one whose result is not delivered yet is kept longer."""
    store: Literal["memory", "sqlite"] = "sqlite"
    """sqlite keeps accepted jobs through a crash; memory is faster and loses them."""
    store_path: StorePath = Path("modalkit.db")
    """The SQLite file; one process owns it at a time."""
    max_stored_jobs: Count = 10_000_000
    """Maximum stored jobs, finished ones included; further ones are refused (HTTP 429)."""
    max_delivery_attempts: Count = 8
    """Attempts to send a result; after the last one it is kept as undelivered."""


class AppSettings(Section):
    """The service: its name, who may call it, how it batches, delivers and is deployed."""

    app_prefix: AppPrefix = "sentiment"
    """First part of the Modal app's name; `MODALKIT_APP_POSTFIX` is the second."""
    require_all_models: bool = False
    """Whether `/health/ready` answers 503 as long as any model failed to load; false: only if all did."""
    server_config: ServerConfig = ServerConfig()
    adapters: list[Adapter] = list(ADAPTERS)
    """Other servers whose clients are answered, by routes in their shapes: openai, tei, vllm; [] for none."""
    ui: bool = True
    """Whether a page at `/` and `/ui` shows what the service does; false: `/` leads to `/docs`."""
    auth_config: AuthConfig = AuthConfig()
    build_config: BuildConfig = BuildConfig()
    deployment_config: DeploymentConfig = DeploymentConfig()
    batch_config: BatchConfig = BatchConfig()
    request_config: RequestConfig = RequestConfig()
    queue_config: QueueConfig = QueueConfig()
    async_config: AsyncConfig = AsyncConfig()
