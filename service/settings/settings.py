"""The settings as a whole, loaded from files, variables and arguments; and those of the models that are served.

Nothing here imports a pipeline: `"module:Class"` names are checked for their form only.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from modalkit.service.settings.fields import ClassPath, Count, DevicesOfModel, NonEmpty, refusal
from modalkit.service.settings.layers import Layer, Origins, deep_merge, read_files, read_variables
from modalkit.service.settings.models import AppSettings, BatchConfig, Section
from modalkit.service.settings.problems import Problem, SettingsError, explain
from modalkit.service.settings.schema import KeyPath, close_name

DEFAULT_MODEL = "sentiment"

_BUNDLED: dict[str, Any] = {"pipeline": "modalkit.pipelines.sentiment:SentimentPipeline", "model_path": "bundled"}
_ENGINES: dict[str, Any] = {
    "cache_folder": None,
    "measure_seconds": 3,
    "max_copied_bytes": 2**30,
    "sameness": {"label_agreement": 0.995, "tie": 0.02, "confidence_change": 0.02, "cosine": 0.999},
}
_COMMON: dict[str, Any] = {"device": "auto", "dtype": "auto", "engines": _ENGINES, "threads": None}
_CONSTRUCTOR_ARGUMENTS = ("model_name", "all_model_data_folder", "common_settings")
_LIMITS = ("app_settings", "batch_config")
_ENTRIES = ("model_settings", "model_entries")


class ModelEntry(Section):
    """One model. Keys other than those below are arguments of the pipeline's constructor."""

    model_config = ConfigDict(extra="allow")

    pipeline: ClassPath
    """The class that runs the model."""
    input_model: ClassPath | None = None
    """The pydantic model of a request; null leaves it to the pipeline."""
    output_model: ClassPath | None = None
    """The pydantic model of a result; null leaves it to the pipeline."""
    batch_config: BatchConfig | None = None
    """Limits of this model's batches: keys of `app_settings.batch_config`; those left out are as there."""
    max_in_flight: Count | None = None
    """Batches of this model that run at once, in place of `batch_config.max_in_flight`."""
    devices: DevicesOfModel | None = None
    """Device of this model, in place of `model_settings.common.device`. Or a list of devices, each with the whole
    model, which take batches from one queue; or ``auto`` for all GPUs. Each after the first has its own process."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, entry: Any) -> Any:
        if isinstance(entry, dict):
            if entry.get("pipeline") is None:
                misspelt = close_name("pipeline", (key for key in entry if key not in cls.model_fields))
                if misspelt is not None:
                    raise refusal("unknown key; did you mean pipeline?", misspelt)
                raise refusal('is missing: add pipeline: "my_module:MyPipeline" (names keep their case)', "pipeline")
            for key in entry:
                if key in _CONSTRUCTOR_ARGUMENTS:
                    raise refusal(f"modalkit itself gives the pipeline its {key}: use another key", key)
        return entry

    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's constructor, as a copy that the pipeline may keep and change."""
        return copy.deepcopy(self.model_extra or {})


class ModelSettings(Section):
    """The models that are served."""

    local_model_repository_folder: Path = Path("models")
    """Folder that relative model paths start from."""
    common: dict[str, Any] = Field(default_factory=_COMMON.copy)
    """Settings of every pipeline (`common_settings`); a missing key keeps its default."""
    model_entries: dict[NonEmpty, ModelEntry] = Field(
        default_factory=lambda: {DEFAULT_MODEL: ModelEntry.model_validate(_BUNDLED)}
    )
    """The models by name. A model of your own replaces the bundled one; list both to serve both."""

    @field_validator("common", mode="before")
    @classmethod
    def _complete_common(cls, common: Any) -> Any:
        return {**_COMMON, **common} if isinstance(common, dict) else common

    @field_validator("model_entries", mode="before")
    @classmethod
    def _complete_bundled(cls, entries: Any) -> Any:
        """An entry called `sentiment` without a pipeline changes the bundled model."""
        if not isinstance(entries, dict) or DEFAULT_MODEL not in entries:
            return entries
        given = {} if entries[DEFAULT_MODEL] is None else entries[DEFAULT_MODEL]
        if not isinstance(given, dict) or close_name("pipeline", map(str, given)) is not None:
            return entries
        return {**entries, DEFAULT_MODEL: {**_BUNDLED, **given}}


class Settings(Section):
    """The whole configuration, frozen: defaults, YAML files over them, then `MODALKIT_…` variables, then arguments.

    Files and the environment are read when an instance is made, and only then. Raises SettingsError, which lists
    everything that is wrong. An old name of a key is read, with a FutureWarning.
    """

    app_settings: AppSettings = AppSettings()
    model_settings: ModelSettings = Field(default_factory=ModelSettings)

    _origins: Origins = PrivateAttr(default=Origins())

    def __init__(
        self,
        _config_files: Sequence[Path | str] | None = None,
        _environ: Mapping[str, str] | None = None,
        **values: Any,
    ) -> None:
        root = type(self)
        environ = os.environ if _environ is None else _environ
        layers = [*read_files(root, _config_files, environ), read_variables(root, environ)]
        if values:
            layers.append(Layer(root, values, {(): "argument"}))
        problems = [problem for layer in layers for problem in layer.problems]
        origins = Origins(layers, (_config_files, _environ), values)
        merged = _complete_limits_of_models(reduce(deep_merge, (layer.values for layer in layers)))
        try:
            super().__init__(**merged)
        except ValidationError as error:
            problems += _each_once(explain(root, error, origins.of))
        if problems:
            raise SettingsError(problems)
        self._origins = origins

    @classmethod
    def load(cls, config_files: Sequence[Path | str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """The settings from `config_files`, later ones over earlier ones, and from `environ` (the process's if None).

        Without `config_files` the files are those named in the variable `MODALKIT_CONFIG`, separated by commas, else
        `modalkit.yaml` of the working directory, if it exists. An empty sequence reads no file. Raises SettingsError.
        """
        return cls(_config_files=config_files, _environ=environ)

    def read_again(self) -> Self:
        """The settings as the same files, variables and arguments give them now. Raises SettingsError."""
        return type(self)(*self._origins.arguments, **self._origins.values)

    def origin(self, *path: str) -> str:
        """Where the value of a key comes from, as in ``modalkit.yaml, line 12``; ``default`` where it is not given."""
        return self._origins.of(path)

    def for_model(self, model_name: str) -> Self:
        """The settings in which `app_settings.batch_config` has the limits of this model.

        Applied again, it changes nothing. A name without an entry has the limits of the application.
        """
        entry = self.model_settings.model_entries.get(model_name)
        if entry is None or (entry.batch_config is None and entry.max_in_flight is None):
            return self
        limits = entry.batch_config or self.app_settings.batch_config
        if entry.max_in_flight is not None:
            limits = limits.model_copy(update={"max_in_flight": entry.max_in_flight})
        entries = {
            **self.model_settings.model_entries,
            model_name: entry.model_copy(update={"batch_config": None, "max_in_flight": None}),
        }
        return self.model_copy(
            update={
                "app_settings": self.app_settings.model_copy(update={"batch_config": limits}),
                "model_settings": self.model_settings.model_copy(update={"model_entries": entries}),
            }
        )


def _complete_limits_of_models(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with those of `app_settings.batch_config` below the `batch_config` of each model that has one."""
    limits, entries = _at(values, _LIMITS), _at(values, _ENTRIES)
    if not (isinstance(limits, Mapping) and isinstance(entries, Mapping)):
        return values
    completed = {
        name: {**entry, "batch_config": deep_merge(limits, entry["batch_config"])}
        for name, entry in entries.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("batch_config"), Mapping)
    }
    return deep_merge(values, {_ENTRIES[0]: {_ENTRIES[1]: completed}}) if completed else values


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _each_once(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without those of a model's limits that are problems of the application's limits as well."""
    of_all = {(problem.path[2:], problem.message) for problem in problems if problem.path[:2] == _LIMITS}
    return [
        problem
        for problem in problems
        if problem.path[:2] != _ENTRIES or (problem.path[4:], problem.message) not in of_all
    ]
