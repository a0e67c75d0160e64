"""Numbers and switches as clients in any language write them: 8, 8.0 and "8" are the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_SWITCHES = {"true": True, "false": False, 1: True, 0: False}


@dataclass(frozen=True)
class AlsoText:
    """Annotates a number that may come as a text too, and an integer as 8.0."""

    pattern: str  # of the whole text

    def read(self, value: Any) -> Any:
        """Return the number that is meant, or the value itself where it is none."""
        if isinstance(value, str) and re.fullmatch(self.pattern, value, re.ASCII):
            value = float(value) if "." in value else int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": f"^{self.pattern}$"}]}


class AlsoWord:
    """Annotates a switch that may come as "true", "false", 1 or 0 too."""

    @staticmethod
    def read(value: Any) -> Any:
        """Return whether it is on, or the value itself where it is no switch."""
        if isinstance(value, str | int):
            return _SWITCHES.get(value.lower() if isinstance(value, str) else value, value)
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"enum": list(_SWITCHES)}]}


def chosen(defaults: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Return what is given, and `defaults` where that is None."""
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


Flag = Annotated[bool, AlsoWord()]
Whole = Annotated[int, AlsoText(r"-?[0-9]{1,20}(\.0{1,6})?")]
Number = Annotated[float, AlsoText(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")]
# -1: as many as there is room for; 0: fill the cache, and answer nothing
MaxTokens = Annotated[int, Field(ge=-1), AlsoText(r"(-1|[0-9]{1,20})(\.0{1,6})?")]
Temperature = Annotated[float, Field(ge=0), AlsoText(r"[0-9]{1,3}(\.[0-9]{1,9})?")]
Share = Annotated[float, Field(ge=0, le=1), AlsoText(r"(0(\.[0-9]{1,9})?|1(\.0{1,9})?)")]
TopK = Annotated[int, Field(ge=-1), AlsoText(r"(-1|[0-9]{1,9})(\.0{1,6})?")]  # -1, 0: off
Factor = Annotated[float, Field(gt=0), AlsoText(r"[1-9][0-9]{0,2}(\.[0-9]{1,9})?")]
