"""A typed function's signature: the JSON schema that the model reads, and the check of what it then passes."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NotRequired, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict


class KeywordCheck:
    """Checks what is passed by name to one of `fns` against their type hints.

    noun: what a fault calls one of them, such as "argument". without: parameters that are not passed by name.
    Raises ValueError for positional-only or variable parameters.

    >>> def scale(name: str, factor: float, label: str = "") -> None: ...
    >>> KeywordCheck(scale, noun="option", without=("name",)).parse({"facto": 2})
    Traceback (most recent call last):
    ValueError: missing option 'factor'; unexpected option 'facto', known are factor, label
    """

    def __init__(self, *fns: Callable[..., Any], noun: str, without: Collection[str] = ()) -> None:
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        fields: dict[str, Any] = {}
        for fn in fns:
            hints = get_type_hints(fn.__init__ if inspect.isclass(fn) else fn, include_extras=True)
            for name, parameter in inspect.signature(fn).parameters.items():
                if name in without:
                    continue
                if parameter.kind not in by_name:
                    raise ValueError(f"fn must take all its arguments by name, got '{parameter}'")
                hint = hints.get(name, Any)
                fields[name] = hint if parameter.default is inspect.Parameter.empty else NotRequired[hint]
        self._noun = noun
        self._known = ", ".join(fields) or "none"
        # a TypedDict and not a model: arguments may have any name, `copy` and `model_id` included
        arguments = with_config(ConfigDict(strict=True, extra="forbid"))(TypedDict("Arguments", fields))  # type: ignore[operator]
        self._adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(arguments)

    def parse(self, passed: Mapping[str, Any]) -> dict[str, Any]:
        """`passed`, as JSON would carry it, in the types of the signature. Types are strict: "1" is no integer.

        Raises ValueError with all faults, in words that the one who passed them can act on.
        """
        plain = dict(passed) if isinstance(passed, Mapping) else passed
        try:
            # through JSON, so that a list fits a tuple and a text an enum, but still no text a number
            return self._adapter.validate_json(json.dumps(plain))
        except ValidationError as error:
            faults = "; ".join(self._describe(fault) for fault in error.errors(include_url=False))
        except (TypeError, ValueError, RecursionError) as error:
            faults = f"{self._noun}s must be a JSON object: {error}"
        raise ValueError(faults)

    def _describe(self, fault: Mapping[str, Any]) -> str:
        if not fault["loc"]:
            return str(fault["msg"])
        name = fault["loc"][0]
        if fault["type"] == "missing" and len(fault["loc"]) == 1:
            return f"missing {self._noun} '{name}'"
        if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
            return f"unexpected {self._noun} '{name}', known are {self._known}"
        message = fault["msg"][0].lower() + fault["msg"][1:]
        return f"{self._noun} '{'.'.join(map(str, fault['loc']))}': {message}, got {shorten(fault['input'])}"


class CallSignature:
    """Name, schema and argument check of `fn`, a function with type hints and a Google-style docstring.

    name and description stand in for those of `fn` where they are given.
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

    def __init__(self, fn: Callable[..., Any], *, name: str | None = None, description: str | None = None) -> None:
        self._check = KeywordCheck(fn, noun="argument")
        function = dict(_schema_of(fn)["function"])
        if name is not None:
            function["name"] = name
        if description is not None:
            function["description"] = description
        self.schema: Mapping[str, Any] = {"type": "function", "function": function}
        self.name: str = function["name"]

    def parse(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`arguments` in the types of the signature. Raises ValueError with all faults, beginning with the name."""
        try:
            return self._check.parse(arguments)
        except ValueError as fault:
            raise ValueError(f"{self.name}: {fault}") from None


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


def shorten(value: object, max_chars: int = 60) -> str:
    """`repr(value)`, cut to `max_chars`."""
    text = repr(value)
    return text if len(text) <= max_chars else text[:max_chars] + "..."
