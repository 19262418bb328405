"""The settings as a whole, loaded from files, variables and arguments."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from modalkit.service.settings.layers import Layer, LayersSource, make_layer, origin
from modalkit.service.settings.models import AppSettings, ModelSettings
from modalkit.service.settings.problems import SettingsError, explain
from modalkit.service.settings.sources import read_files, read_variables


class Settings(BaseSettings):
    """The whole configuration, frozen: defaults, YAML files over them, then `MODALKIT_…` variables, then arguments.

    Files and the environment are read when an instance is made, and only then. Raises SettingsError, which names
    everything that is wrong at once. An old name of a key is read, with a FutureWarning.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    app_settings: AppSettings = AppSettings()
    """The service."""
    model_settings: ModelSettings = Field(default_factory=ModelSettings)
    """The models that it serves."""

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
            layers.append(make_layer(root, values, {(): "argument"}))
        problems = [problem for layer in layers for problem in layer.problems]
        try:
            super().__init__(_layers=layers)
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base's signature, here and below
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The layers that the constructor read, in place of pydantic's own sources."""
        layers: Sequence[Layer] = cast(InitSettingsSource, init_settings).init_kwargs["_layers"]
        return (LayersSource(settings_cls, layers),)
