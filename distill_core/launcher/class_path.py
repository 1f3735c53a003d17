"""Objects that a configuration names by the path of their class or function; needs pydantic."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from distill_core.class_paths import check_class_path, import_class_path


class Section(BaseModel):
    """A section of the configuration; unknown keys and later assignments of wrong values are refused."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_assignment=True, arbitrary_types_allowed=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if value is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            return {}  # the file holds the section's name alone
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("Input should be a number")
        return value


class ClassPath(Section):
    """An object, described by the path of its class or function and the arguments of the call."""

    class_path: str
    init_args: dict[str, Any] = Field(default_factory=dict)

    def make(self) -> Any:
        """Import the class or function, and call it."""
        return import_class_path(self.class_path)(**self.init_args)

    @field_validator("class_path")
    @classmethod
    def _exists(cls, path: str) -> str:
        try:
            check_class_path(path)  # imports nothing, so that checking a file does not run the code that it names
        except ValueError as error:
            raise ValueError(f"Input should be the path of something that can be imported ({error})") from None
        return path

    @model_validator(mode="after")
    def _fits(self) -> ClassPath:
        try:
            check_class_path(self.class_path, self.init_args)
        except ValueError as error:
            raise AssertionError(f"Input should have init_args that {self.class_path} takes ({error})") from None
        return self
