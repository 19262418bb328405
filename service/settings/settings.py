"""The settings as a whole, loaded from files, variables and arguments; and those of the models that are served.

Nothing here imports a pipeline: `"module:Class"` names are checked for their form only.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from modalkit.service.settings.fields import ClassPath, NonEmpty, refusal
from modalkit.service.settings.layers import Layer, deep_merge, origin, read_files, read_variables
from modalkit.service.settings.models import AppSettings, Section
from modalkit.service.settings.problems import SettingsError, explain

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


class ModelEntry(Section):
    """One model. Keys other than those below are arguments of the pipeline's constructor (`**model_entry`)."""

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
        if not isinstance(given, dict) or "pipeline" in given:
            return entries
        return {**entries, DEFAULT_MODEL: {**_BUNDLED, **given}}


class Settings(Section):
    """The whole configuration, frozen: defaults, YAML files over them, then `MODALKIT_…` variables, then arguments.

    Files and the environment are read when an instance is made, and only then. Raises SettingsError, which lists
    everything that is wrong. An old name of a key is read, with a FutureWarning.
    """

    app_settings: AppSettings = AppSettings()
    model_settings: ModelSettings = Field(default_factory=ModelSettings)

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
        try:
            super().__init__(**reduce(deep_merge, (layer.values for layer in layers)))
        except ValidationError as error:
            problems += explain(root, error, lambda path: origin(path, layers))
        if problems:
            raise SettingsError(problems)

    @classmethod
    def load(cls, config_files: Sequence[Path | str] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """The settings from `config_files`, later ones over earlier ones, and from `environ` (the process's if None).

        Without `config_files` the files are those named in the variable `MODALKIT_CONFIG`, separated by commas, else
        `modalkit.yaml` of the working directory, if it exists. An empty sequence reads no file. Raises SettingsError.
        """
        return cls(_config_files=config_files, _environ=environ)
