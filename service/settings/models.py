"""The sections of the configuration: one frozen model per concern, each default written once, here.

The text below a field says what the setting does and what follows from it. Nothing here reads files or variables,
and nothing imports a pipeline: `"module:Class"` names are checked for their form only.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modalkit.service.settings.fields import (
    AppPrefix,
    Backend,
    ClassPath,
    ContainerFolder,
    Count,
    CountOrZero,
    Duration,
    HeaderName,
    Host,
    ModuleName,
    MountPath,
    NonEmpty,
    OneOrMany,
    Secret,
    Wait,
    refusal,
)

DEFAULT_MODEL = "sentiment"

_CONSTRUCTOR_ARGUMENTS = ("model_name", "all_model_data_folder", "common_settings")


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(
        allow_inf_nan=False,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    old_names: ClassVar[Mapping[str, str]] = {}
    """Earlier names of keys, each with its present one: still read from files and variables, with a warning."""


class AuthConfig(Section):
    """Who may call the service."""

    api_key: Secret | None = None
    """Callers must send this key; null lets everyone in."""
    ssm_key: NonEmpty | None = None
    """Name of the AWS SSM parameter that holds the key, in place of `api_key`; read at the start, decrypted."""
    ssm_region: NonEmpty | None = None
    """AWS region of that parameter; null takes it from the environment."""
    ssm_refresh_seconds: Duration = 300
    """How often the parameter is read again; a key that was replaced may work until then, the new one does at once."""
    auth_header: HeaderName = "authorization"
    """The request header that carries the key; `authorization` expects `Bearer <key>`."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.ssm_key is not None:
            raise refusal("api_key is given as well, and only one of them can hold: set the other to null", "ssm_key")
        return self


class BuildConfig(Section):
    """The container image that Modal builds."""

    image: NonEmpty = "python:3.11-slim"
    """Base image; its Python must be 3.11 or newer."""
    tag: str = ""
    """Tag of the base image, where `image` does not name one."""
    workdir: ContainerFolder = "/root"
    """Working directory in the container; relative paths of this configuration start there."""
    env: dict[str, str] = {}
    """Environment variables baked into the image: no place for secrets."""
    extra_run_commands: OneOrMany = []
    """Shell commands, one or a list, run while the image is built; a change rebuilds what follows."""
    python_modules: list[ModuleName] = []
    """Modules of yours to add to the image, besides those that this configuration names and those already imported."""
    bake_models: bool = True
    """Put models into the image when it is built; false leaves them to a volume, or to a download at each start."""


class CloudBucketMount(Section):
    """A bucket (S3, R2, GCS) that appears as a folder in the container."""

    mount_point: MountPath
    """Folder in the container."""
    bucket_name: NonEmpty
    """Name of the bucket."""
    bucket_endpoint_url: NonEmpty | None = None
    """Endpoint for R2, GCS and others; null means AWS."""
    key_prefix: NonEmpty | None = None
    """Show only the objects below this prefix."""
    secret: NonEmpty | None = None
    """Name of the Modal secret that holds the credentials."""
    oidc_auth_role_arn: NonEmpty | None = None
    """AWS role to assume by OIDC, in place of `secret`."""
    read_only: bool = False
    """Refuse writes to the bucket."""
    requester_pays: bool = False
    """Pay for requests to a requester-pays bucket."""


class Mount(Section):
    """A local file or folder that becomes part of the image."""

    local_path: NonEmpty
    """Path on the machine that deploys."""
    remote_path: NonEmpty
    """Path in the container."""
    type: Literal["file", "dir"] = "file"
    """Whether `local_path` is a file or a folder."""


class DeploymentConfig(Section):
    """How Modal runs the containers."""

    old_names: ClassVar[Mapping[str, str]] = {
        "allow_concurrent_inputs": "max_concurrent_inputs",
        "allow_concurrent_inputs_handler": "max_concurrent_requests",
        "concurrency_limit": "max_containers",
        "container_idle_timeout": "scaledown_window",
    }

    gpu: OneOrMany | None = "T4"
    """GPU type, a list of types tried in turn, or null for a container without one."""
    cpu: Duration | None = None
    """CPU cores reserved per container; null is Modal's default."""
    memory: Count | None = None
    """Memory reserved per container, in MiB; null is Modal's default."""
    min_containers: CountOrZero | None = None
    """Containers kept warm when idle, and paid for; null keeps none."""
    max_containers: Count | None = 10
    """Upper limit of containers, and so of cost; null leaves it to Modal."""
    scaledown_window: Count | None = 300
    """Seconds an idle container waits for work before it stops; longer means fewer cold starts and more idle cost."""
    max_concurrent_inputs: Count = 64
    """Inputs one container handles at a time: the requests among which it can form batches."""
    target_concurrent_inputs: Count | None = None
    """Inputs of one container at which Modal starts another; null: 8, as each may be a list as long as a batch."""
    max_concurrent_requests: Count = 256
    """HTTP requests that one web container handles at a time: those that it gathers into lists."""
    timeout: Count = 300
    """Seconds after which Modal gives up on one input."""
    memory_snapshot: bool = False
    """Start containers from a snapshot taken after the weights are loaded: quicker cold starts."""
    gpu_snapshot: bool = False
    """Include GPU memory in the snapshot; needs `memory_snapshot` and a GPU."""
    secure: bool = True
    """Require Modal's proxy authentication (`Modal-Key` and `Modal-Secret` headers); false opens the URL to all."""
    region: OneOrMany | None = None
    """Region or regions to run in; null lets Modal choose, at the lowest price."""
    retries: CountOrZero = 1
    """How often Modal runs an input again after its container failed."""
    secrets: list[NonEmpty] = []
    """Names of Modal secrets whose entries become environment variables of the container."""
    volumes: dict[MountPath, NonEmpty] = {}
    """Modal volumes, as mount path: volume name."""
    volume_reload_interval_seconds: Count | None = None
    """How often a running container looks for new data on its volumes; null never does."""
    cloud_bucket_mounts: list[CloudBucketMount] = []
    """Buckets mounted as folders."""
    mounts: list[Mount] = []
    """Local files and folders copied into the image."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_containers and self.max_containers is not None and self.min_containers > self.max_containers:
            raise refusal(
                f"{self.min_containers} is more than max_containers ({self.max_containers}): lower it, or raise that",
                "min_containers",
            )
        if self.scaledown_window is not None and not 2 <= self.scaledown_window <= 3600:
            raise refusal(f"Modal takes 2 to 3600 seconds, not {self.scaledown_window}", "scaledown_window")
        if self.gpu_snapshot and not self.memory_snapshot:
            raise refusal("a GPU snapshot is part of a memory snapshot: set memory_snapshot: true too", "gpu_snapshot")
        if self.gpu_snapshot and not self.gpu:
            raise refusal("there is no GPU to snapshot: name one in gpu, or set this to false", "gpu_snapshot")
        if self.target_concurrent_inputs is not None and self.target_concurrent_inputs > self.max_concurrent_inputs:
            raise refusal(
                f"{self.target_concurrent_inputs} is more than max_concurrent_inputs ({self.max_concurrent_inputs}): "
                "lower it, or raise that",
                "target_concurrent_inputs",
            )
        return self

    @model_validator(mode="after")
    def _each_mounted_once(self) -> Self:
        at: dict[str, str] = {}
        for path, name in self.volumes.items():
            if name in at:
                raise refusal(
                    f"Modal mounts a volume in one place only, and {name!r} is at {at[name]} too", "volumes", path
                )
            at[name] = path
        mounted = set(self.volumes)
        for index, bucket in enumerate(self.cloud_bucket_mounts):
            if bucket.mount_point in mounted:
                key = ("cloud_bucket_mounts", str(index), "mount_point")
                raise refusal(f"{bucket.mount_point} is taken by another volume or bucket: use another folder", *key)
            mounted.add(bucket.mount_point)
        return self


class CalibrationConfig(Section):
    """How the scheduler learns what a batch costs, by which it forms them."""

    enabled: bool = True
    """Measure a few batches of made-up items at start; without, the first real batches teach it."""
    max_seconds: Duration = 3
    """Most seconds to spend on it."""
    path: Path | None = None
    """File that keeps what was learnt between starts, for each model and device; null measures anew each time."""


class BatchConfig(Section):
    """The limits within which the scheduler forms batches."""

    max_batch_size: Count = 32
    """Most items in one batch; more fills a GPU better and costs memory."""
    wait_ms: Wait = 0
    """Longest wait of an idle worker for a fuller batch, in milliseconds, where the measured costs say that it pays."""
    max_batch_tokens: Count | None = None
    """Most tokens in one batch, padding included, the bound on its memory; null sets no bound."""
    max_batch_seconds: Duration | None = None
    """Longest predicted run of one batch, so that no request waits long behind it; null sets no bound."""
    max_queue_size: Count = 10_000
    """Most waiting requests; one more is refused (HTTP 429)."""
    max_age_ms: Wait = 2000
    """Age in milliseconds past which the oldest request goes into the next batch, whatever its size."""
    max_bulk_batch_ms: Literal["auto"] | Duration = "auto"
    """Longest predicted run of a batch of jobs while single requests arrive; auto: as short as costs jobs 3 %."""
    batch_timeout_seconds: Duration = 120
    """Seconds after which a batch hangs: its items then run alone, and those that hang again fail."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How the costs of batches are learnt."""

    @model_validator(mode="after")
    def _a_batch_fits_the_queue(self) -> Self:
        if self.max_batch_size > self.max_queue_size:
            raise refusal(
                f"{self.max_batch_size} is more than max_queue_size ({self.max_queue_size}), so no batch could ever"
                " fill: lower it, or raise max_queue_size",
                "max_batch_size",
            )
        return self


class SqsConfig(Section):
    """Amazon SQS, for `backend: sqs`."""

    region: NonEmpty | None = None
    """AWS region; null takes it from the environment."""
    endpoint_url: NonEmpty | None = None
    """Another server that speaks SQS; null means AWS."""
    create_missing_queues: bool = False
    """Create a named queue that does not exist; otherwise its results stay undelivered."""
    message_group_id: NonEmpty | None = None
    """Message group in FIFO queues; null makes each message a group of its own: full throughput, no order."""


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
    """Settings of `backend: sqs`."""
    webhook: WebhookConfig = WebhookConfig()
    """Settings of `backend: webhook`."""
    routes: dict[NonEmpty, Backend] = {}
    """For `backend: routing`: queue name pattern: backend, the first match taken."""
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

    timeout: Duration = 3600
    """Seconds a job may take from its first dispatch; later it expires."""
    max_attempts: Count = 5
    """Runs of a job that fails with all others of its batch, as when a database is down; 5 last some 85 s or more."""
    result_ttl: Duration = 86_400
    """Seconds a finished job and its result can be asked for; those with something left to deliver stay longer."""
    store: Literal["memory", "sqlite"] = "sqlite"
    """sqlite keeps accepted jobs through a crash; memory is quicker and loses them."""
    store_path: Path = Path("modalkit.db")
    """The SQLite file; one process owns it at a time."""
    max_stored_jobs: Count = 10_000_000
    """Most jobs stored, finished ones included; one more is refused (HTTP 429)."""
    max_delivery_attempts: Count = 8
    """Attempts to send a result before it is set aside as undelivered."""


class AppSettings(Section):
    """The service: its name, who may call it, how it batches, delivers and is deployed."""

    app_prefix: AppPrefix = "sentiment"
    """First part of the Modal app's name; `MODALKIT_APP_POSTFIX` is the second."""
    auth_config: AuthConfig = AuthConfig()
    """Who may call the service."""
    build_config: BuildConfig = BuildConfig()
    """The container image."""
    deployment_config: DeploymentConfig = DeploymentConfig()
    """The containers on Modal."""
    batch_config: BatchConfig = BatchConfig()
    """How batches are formed."""
    queue_config: QueueConfig = QueueConfig()
    """Where results are sent."""
    async_config: AsyncConfig = AsyncConfig()
    """How jobs are kept."""


class ModelEntry(Section):
    """One model. Keys other than those below are handed to the pipeline's constructor (`**model_entry`)."""

    model_config = ConfigDict(extra="allow")

    pipeline: ClassPath
    """The class that runs the model."""
    input_model: ClassPath | None = None
    """The pydantic model of a request; null leaves it to the pipeline."""
    output_model: ClassPath | None = None
    """The pydantic model of a result; null leaves it to the pipeline."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, entry: Any) -> Any:
        if isinstance(entry, dict):
            if entry.get("pipeline") is None:
                raise refusal('is missing: add pipeline: "my_module:MyPipeline" (names keep their case)', "pipeline")
            for key in entry:
                if key in _CONSTRUCTOR_ARGUMENTS:
                    raise refusal(f"modalkit itself gives the pipeline its {key}: use another key", key)
        return entry

    def arguments(self) -> dict[str, Any]:
        """The keys for the pipeline's constructor, as a copy that the pipeline may keep and change."""
        return copy.deepcopy(self.model_extra or {})


_COMMON: dict[str, Any] = {"device": "auto", "dtype": "auto", "threads": None}
_BUNDLED: dict[str, Any] = {"pipeline": "modalkit.pipelines.sentiment:SentimentPipeline", "model_path": "bundled"}


class ModelSettings(Section):
    """The models that are served."""

    local_model_repository_folder: Path = Path("models")
    """Folder that relative model paths start from."""
    common: dict[str, Any] = Field(default_factory=_COMMON.copy)
    """Settings that every pipeline gets (`common_settings`); a key left out keeps its default."""
    model_entries: dict[NonEmpty, ModelEntry] = Field(
        default_factory=lambda: {DEFAULT_MODEL: ModelEntry.model_validate(_BUNDLED)}
    )
    """The models by name. To name any is to replace the bundled one."""

    @field_validator("common", mode="before")
    @classmethod
    def _complete_common(cls, common: Any) -> Any:
        return {**_COMMON, **common} if isinstance(common, dict) else common

    @field_validator("model_entries", mode="before")
    @classmethod
    def _complete_bundled(cls, entries: Any) -> Any:
        """An entry called `sentiment` that names no pipeline is the bundled one with changes."""
        if not isinstance(entries, dict) or DEFAULT_MODEL not in entries:
            return entries
        given = {} if entries[DEFAULT_MODEL] is None else entries[DEFAULT_MODEL]
        if not isinstance(given, dict) or "pipeline" in given:
            return entries
        return {**entries, DEFAULT_MODEL: {**_BUNDLED, **given}}
