"""Arguments checked against a JSON schema, for tools whose parameters are declared and not typed Python."""

import json
from collections.abc import Mapping
from typing import Any

from gtpo.tools.signature import shorten
from gtpo.tools.source import optional_package


class SchemaCheck:
    """Checks a call's arguments against `parameters`, a JSON schema of type "object".

    Raises ValueError where `parameters` is no such schema.

    >>> check = SchemaCheck("weather", {"type": "object", "properties": {"days": {"type": "integer", "maximum": 7}},
    ...                                  "required": ["days"], "additionalProperties": False})
    >>> check.parse({"days": 9, "town": "Ulm"})
    Traceback (most recent call last):
    ValueError: weather: argument 'days': 9 is greater than the maximum of 7; unexpected argument 'town', known are days
    """

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        jsonschema = optional_package("jsonschema", tool="http_api and mcp")
        if parameters.get("type") != "object":
            raise ValueError(f'the parameters of {name} must be a schema of type "object", got {dict(parameters)}')
        validator = jsonschema.Draft202012Validator
        try:
            validator.check_schema(parameters)
        except jsonschema.SchemaError as error:
            raise ValueError(f"the parameters of {name} are no JSON schema: {error.message}") from None
        self._name = name
        self._known = ", ".join(parameters.get("properties", {})) or "none"
        self._properties = parameters.get("properties", {})
        self._validator = validator(parameters)

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`arguments`, unchanged. Raises ValueError with all faults, in words that a model can act on."""
        try:
            # what no JSON text can carry would fail only when it is sent: NaN, half a surrogate pair
            plain = json.loads(json.dumps(dict(arguments), allow_nan=False, ensure_ascii=False).encode())
            # sorted: the order of the validator's faults is that of a set
            faults = sorted({text for fault in self._validator.iter_errors(plain) for text in self._describe(fault)})
        except (TypeError, ValueError, RecursionError) as error:
            faults = [f"arguments must be a JSON object: {error}"]
            plain = {}
        if faults:
            raise ValueError(f"{self._name}: {'; '.join(faults)}")
        return dict(plain)

    def _describe(self, fault: Any) -> list[str]:
        place = ".".join(map(str, fault.absolute_path))
        if not place and fault.validator == "required":
            return [f"missing argument '{name}'" for name in fault.validator_value if name not in fault.instance]
        if not place and fault.validator == "additionalProperties":
            unknown = [name for name in fault.instance if name not in self._properties]
            return [f"unexpected argument '{name}', known are {self._known}" for name in unknown]
        message = fault.message if len(fault.message) <= 200 else f"{shorten(fault.instance)} does not fit"
        return [f"argument '{place}': {message}" if place else message]


def call_schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool, as chat templates take it."""
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}
