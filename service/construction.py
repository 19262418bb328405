"""Constructs pipelines: gives a constructor what it asks for by name, and explains which keys of an entry are wrong."""

import inspect
from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

from modalkit.pipelines import InferencePipeline
from modalkit.service.settings import ModelEntry
from modalkit.service.settings.schema import close_name

STANDARD_ARGUMENTS = ("model_name", "all_model_data_folder", "common_settings")
"""What modalkit itself passes to a constructor that asks for it, in the order of the documented signature."""


class Constructor:
    """The constructor of a pipeline class.

    Its parameters get the keys of the model's entry and the `STANDARD_ARGUMENTS` by their names; ``**options`` gets
    those that no other parameter takes. ``*args`` without other positional parameters gets the standard arguments.
    A class without a constructor of its own takes no keys.
    """

    def __init__(self, pipeline_class: type[InferencePipeline]) -> None:
        self._class = pipeline_class
        _, *parameters = inspect.signature(pipeline_class.__init__).parameters.values()
        self._signature = inspect.Signature(parameters)
        kinds = {parameter.kind for parameter in parameters}
        self._is_own = pipeline_class.__init__ is not InferencePipeline.__init__
        self._takes_any_key = self._is_own and Parameter.VAR_KEYWORD in kinds
        self._named = {
            parameter.name: parameter
            for parameter in parameters
            if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
        }
        self._passes_on_positions = not any(
            name in STANDARD_ARGUMENTS or parameter.kind is not Parameter.KEYWORD_ONLY
            for name, parameter in self._named.items()
        )
        self._keys = [name for name in self._named if name not in STANDARD_ARGUMENTS]

    def problems(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Each key of the entry that is wrong or missing, and what is wrong with it."""
        for key in entry:
            if key not in self._named and not self._takes_any_key:
                meant = close_name(key, [*self._keys, *ModelEntry.model_fields])
                suggestion = "." if meant is None else f"; did you mean {meant}?"
                yield key, f"the constructor of {self._class.__name__} does not take it{suggestion} {self._takes()}"
        for name in self._keys:
            if name in entry or self._named[name].default is not Parameter.empty:
                continue
            if name in ModelEntry.model_fields:
                yield name, f"modalkit uses this key itself: rename the parameter of {self._class.__name__}.__init__"
            else:
                yield name, f"is missing: add it, the constructor of {self._class.__name__} needs it. {self._takes()}"

    def misspelt(self, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Each key that only ``**options`` takes and that is similar to one of modalkit's own, and that one."""
        for key in entry:
            meant = close_name(key, ModelEntry.model_fields)
            if key not in self._named and self._takes_any_key and meant is not None:
                yield key, meant

    def make(self, arguments: Mapping[str, Any], entry: Mapping[str, Any]) -> InferencePipeline:
        """Construct the pipeline; `arguments` are the `STANDARD_ARGUMENTS`. Raises what the constructor raises."""
        bound = self._bound(arguments, entry)
        pipeline = self._class.__new__(self._class, *bound.args, **bound.kwargs)
        # Before the constructor, which may use them, and need not set them.
        for name, value in {**arguments, "model_entry": dict(entry)}.items():
            setattr(pipeline, name, value)
        self._class.__init__(pipeline, *bound.args, **bound.kwargs)
        # A constructor may have set another one, but requests and jobs find a model by its name in the configuration.
        pipeline.model_name = arguments["model_name"]
        return pipeline

    def _bound(self, arguments: Mapping[str, Any], entry: Mapping[str, Any]) -> inspect.BoundArguments:
        remaining = {**arguments, **entry}
        bound = self._signature.bind_partial()
        for parameter in self._signature.parameters.values():
            if parameter.kind is Parameter.VAR_KEYWORD:
                bound.arguments[parameter.name] = remaining
            elif parameter.kind is not Parameter.VAR_POSITIONAL:
                if parameter.name in remaining:
                    bound.arguments[parameter.name] = remaining.pop(parameter.name)
            elif self._passes_on_positions:
                bound.arguments[parameter.name] = tuple(remaining.pop(name) for name in STANDARD_ARGUMENTS)
        bound.apply_defaults()
        return bound

    def _takes(self) -> str:
        if not self._is_own:
            return "The class has no __init__: add one with a parameter for each key"
        if not self._keys:
            return "It takes no keys"
        names = [name if self._named[name].default is Parameter.empty else f"{name} (optional)" for name in self._keys]
        return f"It takes {', '.join(names)}{' and any other key' if self._takes_any_key else ''}"
