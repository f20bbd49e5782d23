"""Arguments of a call whose form writes every value as text, in the types that the tool's schema names."""

import json
from collections.abc import Mapping
from typing import Any

from gtpo.types import ToolCall

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def typed(call: ToolCall, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of `call`; what came as text and is no text by the tool's `schema` is read as JSON, if it is some.

    >>> properties = {"n": {"type": "integer"}, "s": {"type": "string"}}
    >>> schema = {"function": {"name": "f", "parameters": {"properties": properties}}}
    >>> typed(ToolCall("f", {"n": "4", "s": "4"}, is_text=True), schema)
    {'n': 4, 's': '4'}
    """
    if not call.is_text:
        return call.arguments
    properties = schema["function"].get("parameters", {}).get("properties", {})
    return {name: _typed(value, _types(properties.get(name))) for name, value in call.arguments.items()}


def _types(schema: Any) -> set[str]:
    """The types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type", ())
    found = {kinds} if isinstance(kinds, str) else {*kinds}
    return found.union(*(_types(option) for key in ("anyOf", "oneOf") for option in schema.get(key, ())))


def _typed(value: Any, types: set[str]) -> Any:
    if not isinstance(value, str) or not types or "string" in types:
        return value
    try:
        return json.loads(_PYTHON_WORDS.get(value.strip(), value))
    except (ValueError, RecursionError):
        return value
