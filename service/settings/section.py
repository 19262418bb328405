"""What all groups of settings are."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from modalkit.service.settings.fields import refusal


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    old_names: ClassVar[Mapping[str, str]] = {}
    """Earlier names of keys, each with its present name; they are still read, with a warning."""

    def require_at_most(self, key: str, limit: str, consequence: str = "") -> None:
        """Refuse a value of the setting `key` above that of the setting `limit`, where neither is null."""
        value, maximum = getattr(self, key), getattr(self, limit)
        if value is not None and maximum is not None and value > maximum:
            raise refusal(f"{value} is more than {limit} ({maximum}){consequence}: lower it, or raise {limit}", key)
