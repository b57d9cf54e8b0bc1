"""Requests that are wrong in a million places are refused for the first one, in no more time than a right one takes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

__all__ = ["RequestModel"]


def _stop_at_first(schema: Any) -> None:  # before the class, whose making calls it
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_at_first(part)
    elif isinstance(schema, list):
        for part in schema:
            _stop_at_first(part)


class RequestModel(BaseModel):
    """Base of what callers send: unknown fields are refused, and only the first fault of a list or an object is kept.

    Without that a body of a few megabytes of wrong values costs minutes and gigabytes, for an answer that names one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make every list and object within end at its first fault."""
        schema = handler(source)
        _stop_at_first(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, data: Any) -> Any:
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields) + 1:
            return data
        known = {name: value for name, value in data.items() if name in cls.model_fields}
        unknown = next(name for name in data if name not in cls.model_fields)
        return known | {unknown: data[unknown]}
