"""A typed function's signature: the JSON schema that the model reads, and the check of what it then passes."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict


class CallSignature:
    """Name, schema and argument check of `fn`, a function with type hints and a Google-style docstring.

    Raises ValueError where a hint, the docstring or an argument's description is missing, and for positional-only or
    variable arguments.

    >>> def add(a: int, b: int = 0) -> int:
    ...     '''Add two numbers.
    ...
    ...     Args:
    ...         a: The first.
    ...         b: The second.
    ...     '''
    ...     return a + b
    >>> CallSignature(add).parse({"a": "1", "c": 2})
    Traceback (most recent call last):
    ValueError: add: argument 'a': input should be a valid integer, got '1'; unexpected argument 'c', known are a, b
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(fn).parameters
        for parameter in parameters.values():
            if parameter.kind not in by_name:
                raise ValueError(f"fn must take all its arguments by name, got '{parameter}'")
        self.schema = _schema_of(fn)
        self.name: str = self.schema["function"]["name"]
        hints = get_type_hints(fn, include_extras=True)
        fields = {
            name: hints[name] if parameter.default is inspect.Parameter.empty else NotRequired[hints[name]]
            for name, parameter in parameters.items()
        }
        self._known = ", ".join(fields) or "none"
        # a TypedDict and not a model: arguments may have any name, `copy` and `model_id` included
        arguments = with_config(ConfigDict(strict=True, extra="forbid"))(TypedDict("Arguments", fields))  # type: ignore[operator]
        self._adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(arguments)

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`arguments`, as JSON would carry them, in the types of the signature. Types are strict: "1" is no integer.

        Raises ValueError with all faults, in words that a model can act on.
        """
        plain = dict(arguments) if isinstance(arguments, Mapping) else arguments
        try:
            # through JSON, so that a list fits a tuple and a text an enum, but still no text a number
            return self._adapter.validate_json(json.dumps(plain))
        except ValidationError as error:
            faults = "; ".join(self._describe(fault) for fault in error.errors(include_url=False))
        except (TypeError, ValueError, RecursionError) as error:
            faults = f"arguments must be a JSON object: {error}"
        raise ValueError(f"{self.name}: {faults}")

    def _describe(self, fault: Mapping[str, Any]) -> str:
        if not fault["loc"]:
            return str(fault["msg"])
        name = fault["loc"][0]
        if fault["type"] == "missing" and len(fault["loc"]) == 1:
            return f"missing argument '{name}'"
        if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
            return f"unexpected argument '{name}', known are {self._known}"
        message = fault["msg"][0].lower() + fault["msg"][1:]
        return f"argument '{'.'.join(map(str, fault['loc']))}': {message}, got {_shorten(fault['input'])}"


def _schema_of(fn: Callable[..., Any]) -> Mapping[str, Any]:
    # transformers takes a second to import: only where a schema is really built
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: Mapping[str, Any] = get_json_schema(fn)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(
            f"fn must have type hints and a docstring with a line for each argument under 'Args:', got: {error}"
        ) from None
    return schema


def _shorten(value: object, max_chars: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= max_chars else text[:max_chars] + "..."
