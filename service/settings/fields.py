"""The types of settings, each with its check and the message when it fails."""

import re
from ipaddress import ip_network
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_core import PydanticCustomError

BUILT_IN_BACKENDS = ("none", "memory", "sqs", "taskiq", "webhook", "routing")

MAX_LIFETIME_S = 3_153_600_000
"""A hundred years: the store keeps times as whole microseconds."""
MIN_PER_SECOND = 1e-6
"""One in eleven days: the seconds that one takes must be a number."""

_TAKEN_HEADER = (
    "accept|connection|content-.*|cookie|expect|host|idempotency-key|keep-alive|last-event-id|prefer|te|traceparent|"
    "trailer|transfer-encoding|upgrade|x-forwarded-.*|x-priority|x-request-.*"
)
_UNMOUNTABLE = ("/", "/root", "/tmp")  # noqa: S108  # names that are refused
_DOTTED_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_CLASS_PATH = f"{_DOTTED_NAME}:{_DOTTED_NAME}"


def refusal(message: str, *key: str) -> PydanticCustomError:
    """The error for a refused value; `key` is the path of its key below the section that raises the error."""
    return PydanticCustomError("refused", "{message}", {"message": message, "key": key})


def _matching(pattern: str, demand: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise refusal(f"{demand}, not {value!r}")
        return value

    return AfterValidator(check)


def _check_container_folder(value: str) -> str:
    path = PurePosixPath(value)
    if not path.is_absolute() or ".." in path.parts:
        raise refusal(f'must be an absolute path in the container, as in "/app", and without "..", not {value!r}')
    return str(path)


def _check_mount_path(value: str) -> str:
    if value in _UNMOUNTABLE:
        raise refusal(f'Modal mounts nothing at {value}: use a folder of its own, as in "/models"')
    return value


def _check_host(value: str) -> str:
    if not value or "/" in value:
        # The value is not shown: the path of a webhook's URL is often its secret.
        raise refusal("must be a host alone, as in hooks.example.com, without scheme and path")
    return value


def _check_proxy(value: str) -> str:
    try:
        if value != "*":
            ip_network(value)
    except ValueError:
        raise refusal(
            f'must be an address or a network, as in 10.0.0.0/8, or "*" for all of them, not {value!r}'
        ) from None
    return value


def _check_header(value: str) -> str:
    if re.fullmatch(_TAKEN_HEADER, value, re.IGNORECASE):
        raise refusal(f"{value} has another use: name a header that only carries the key, as x-api-key")
    return value


def _check_store_path(value: Any) -> Any:
    if value == "" or (isinstance(value, str) and value.startswith((":memory:", "file:"))):
        raise refusal(f"must be the path of a file, not {value!r}; for jobs in memory set store: memory")
    return value


def _refuse_bool(value: Any) -> Any:
    # In Python, and so in pydantic, true is 1: `max_batch_size: yes` would mean batches of one.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def _check_one_or_many(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError("one_or_many", "must be a text, or a list of texts, none of them empty")
    return value


def _check_devices(value: Any) -> Any:
    devices = value if isinstance(value, list) else [value]
    if not (devices and all(isinstance(device, str) and device for device in devices)):
        raise refusal("must be the name of a device, as in cpu or cuda:0, or a list of these, or auto for all GPUs")
    if len(devices) > 1 and "auto" in devices:
        raise refusal("auto stands for all GPUs, so it must be alone")
    return devices


_Number = BeforeValidator(_refuse_bool)
Count = Annotated[int, _Number, Field(ge=1)]
CountOrZero = Annotated[int, _Number, Field(ge=0)]
Duration = Annotated[float, _Number, Field(gt=0)]
Lifetime = Annotated[Duration, Field(le=MAX_LIFETIME_S)]
PerSecond = Annotated[float, _Number, Field(ge=MIN_PER_SECOND)]
Wait = Annotated[float, _Number, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
DevicesOfModel = Annotated[list[str], BeforeValidator(_check_devices)]
OneOrMany = Annotated[str | list[str], BeforeValidator(_check_one_or_many)]
ClassPath = Annotated[str, _matching(_CLASS_PATH, 'must have the form "module:Class", as in "my_module:MyPipeline"')]
ModuleName = Annotated[
    str, _matching(_DOTTED_NAME, "must be the name of a Python module, as in my_module or my_package.part")
]
Backend = Annotated[
    str,
    _matching(
        "|".join((*BUILT_IN_BACKENDS, _CLASS_PATH)),
        f'must be one of {", ".join(BUILT_IN_BACKENDS)}, or "module:Class" for one of your own',
    ),
]
AppPrefix = Annotated[
    str,
    # Modal's names have up to 64; the longest one ends in the postfix of the app and in "-metrics".
    _matching("[A-Za-z0-9._-]{1,48}", "must be 1 to 48 letters, digits, dots, dashes or underscores"),
]
HeaderName = Annotated[
    str,
    _matching("[!#$%&'*+.^_`|~0-9A-Za-z-]+", "must be the name of an HTTP header, as in authorization or x-api-key"),
    AfterValidator(_check_header),
]
RootPath = Annotated[
    str, _matching("(/[A-Za-z0-9._~-]+)*", "must be empty, or a path without a slash at its end, as in /models")
]
TrustedProxy = Annotated[str, AfterValidator(_check_proxy)]
KeyName = Annotated[
    str, _matching("[A-Za-z0-9._-]{1,64}", "must be 1 to 64 letters, digits, dots, dashes or underscores")
]
ContainerFolder = Annotated[str, AfterValidator(_check_container_folder)]
MountPath = Annotated[ContainerFolder, AfterValidator(_check_mount_path)]
StorePath = Annotated[Path, BeforeValidator(_check_store_path)]
Host = Annotated[str, AfterValidator(_check_host)]
Secret = Annotated[SecretStr, Field(min_length=1)]
