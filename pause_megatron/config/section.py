"""The base of the sections of a configuration, and the types of its texts that are paths."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from pause_megatron.files.paths import expanded, expanded_pattern

PathText = Annotated[str, AfterValidator(expanded)]
"""A path, or a name in its place."""

PatternText = Annotated[str, AfterValidator(expanded_pattern)]
"""A path or a glob."""


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are refused ("4" is not 4, true is not 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
