"""The settings of the image and the containers on Modal."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from modalkit.service.settings.fields import (
    ContainerFolder,
    Count,
    CountOrZero,
    Duration,
    ModuleName,
    MountPath,
    NonEmpty,
    OneOrMany,
    refusal,
)
from modalkit.service.settings.section import Section


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
    """Your modules to add to the image, besides those that this configuration names and those already imported."""
    bake_models: bool = True
    """Put models into the image when it is built; false: from a volume, or downloaded at each start."""


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
    """Inputs that one container handles at a time, and so can put into batches together."""
    target_concurrent_inputs: Count | None = None
    """Inputs of one container at which Modal starts another; null: 8, because each input may hold a whole batch."""
    max_concurrent_requests: Count = 256
    """HTTP requests that one web container handles at a time; it collects them into calls."""
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
    """Seconds between two looks of a running container for new data on its volumes; null: it never looks."""
    cloud_bucket_mounts: list[CloudBucketMount] = []
    """Buckets mounted as folders."""
    mounts: list[Mount] = []
    """Local files and folders copied into the image."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.require_at_most("min_containers", "max_containers")
        self.require_at_most("target_concurrent_inputs", "max_concurrent_inputs")
        if self.scaledown_window is not None and not 2 <= self.scaledown_window <= 3600:
            raise refusal(f"Modal takes 2 to 3600 seconds, not {self.scaledown_window}", "scaledown_window")
        if self.gpu_snapshot and not self.memory_snapshot:
            raise refusal("a GPU snapshot is part of a memory snapshot: set memory_snapshot: true too", "gpu_snapshot")
        if self.gpu_snapshot and not self.gpu:
            raise refusal("there is no GPU to snapshot: name one in gpu, or set this to false", "gpu_snapshot")
        return self

    @model_validator(mode="after")
    def _each_mounted_once(self) -> Self:
        for path, name in self.volumes.items():
            first = next(other for other, volume in self.volumes.items() if volume == name)
            if first != path:
                raise refusal(
                    f"Modal mounts a volume in one place only, and {name!r} is at {first} too", "volumes", path
                )
        mounted = set(self.volumes)
        for index, bucket in enumerate(self.cloud_bucket_mounts):
            if bucket.mount_point in mounted:
                key = ("cloud_bucket_mounts", str(index), "mount_point")
                raise refusal(f"{bucket.mount_point} is taken by another volume or bucket: use another folder", *key)
            mounted.add(bucket.mount_point)
        return self
