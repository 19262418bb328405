"""The settings of a model of the transformers library, checked before any file is opened."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from modalkit.pipelines.engines.settings import DTypeName, EngineName, EngineOptions, EngineSettings
from modalkit.pipelines.errors import ModelLoadError

BUNDLED = "bundled"

DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
DEVICE_KEYS = "devices of the entry, or else model_settings.common.device"
"""Where a configuration says which device a model gets."""
DeviceName = Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]
SettingsT = TypeVar("SettingsT", bound=BaseModel)


class CommonSettings(BaseModel):
    """``model_settings.common``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: DeviceName = Field(default="auto", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", DTypeName] = Field(default="auto", description="auto, float32, bfloat16 or float16")
    engines: EngineOptions = Field(
        default=EngineOptions(),
        description=f"a group of settings of engines ({', '.join(EngineOptions.model_fields)})",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="a positive whole number of CPU threads, or null for torch's own, within the container's quota",
    )


class TextModelEntry(BaseModel):
    """The entry of a model that reads texts, in ``model_settings.model_entries``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_path: str = Field(min_length=1, strict=True, description="a folder, or owner/name of a model on a hub")
    max_length: int | None = Field(
        default=None, ge=1, strict=True, description="a positive whole number of tokens, or null for the model's limit"
    )
    engine: Literal["auto", EngineName] = Field(default="auto", description=f"auto, {', '.join(get_args(EngineName))}")
    dtype: Literal["auto", DTypeName] | None = Field(
        default=None, description="auto, float32, bfloat16, float16, or null for that of model_settings.common"
    )
    revision: str | None = Field(default=None, min_length=1, description="a branch, tag or commit on the hub, or null")


EntryT = TypeVar("EntryT", bound=TextModelEntry)


class ClassifierEntry(TextModelEntry):
    """The entry of a text classifier; without a `model_path`, of the bundled one."""

    model_path: str = Field(
        default=BUNDLED, min_length=1, strict=True, description="bundled, a folder, or owner/name of a model on a hub"
    )


def engine_settings(common: CommonSettings, entry: TextModelEntry) -> EngineSettings:
    """The settings of a model's engine; its entry's number format is used in place of the common one."""
    return EngineSettings(**dict(common.engines), engine=entry.engine, dtype=entry.dtype or common.dtype)


def parse_settings(
    model_name: str, common_settings: dict[str, Any], model_entry: dict[str, Any], entry_model: type[EntryT]
) -> tuple[CommonSettings, EntryT]:
    """Check both parts. Raises `ModelLoadError`, which names each wrong key by its path in the configuration file."""
    return (
        _parse(CommonSettings, "model_settings.common", common_settings),
        _parse(entry_model, f"model_settings.model_entries.{model_name}", model_entry),
    )


def _parse(model: type[SettingsT], path: str, values: dict[str, Any]) -> SettingsT:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [f"{_key(path, problem)}: {_explain(model, problem)}" for problem in error.errors()]
        raise ModelLoadError("; ".join(problems)) from error


def _key(path: str, problem: ErrorDetails) -> str:
    key = f"{path}.{problem['loc'][0]}"
    return DEVICE_KEYS if key == "model_settings.common.device" else key


def _explain(model: type[BaseModel], problem: ErrorDetails) -> str:
    field = model.model_fields.get(str(problem["loc"][0]))
    if field is None:
        return f"there is no such setting; there are {', '.join(sorted(model.model_fields))}"
    if problem["type"] == "missing":
        return f"it is missing: give {field.description}"
    return f"{problem['input']!r} is not {field.description}"
