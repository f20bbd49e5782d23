"""One call from its text, in each of the forms in which families of models write it.

The protocol asks for a JSON object in <tool_call> tags. Models that learned another form fall back into it: bare JSON
(Llama 3), [TOOL_CALLS] (Mistral), XML of functions (Qwen 3 Coder), keys and values in tags (GLM).
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from gtpo.types import ToolCall

# where a call in a model's own form may begin; an object of JSON at the start of a line, behind a thought or a tag
OWN_OPENING = (
    r"\[TOOL_CALLS\]|<function=(?=[^<>\n]{1,200}>)"
    r"|(?:^|(?<=[kgt]>)|<\|(?:python_tag|tool_call)\|>\s*+)[ \t]*+(?:\[\s*+)?"
    r"\{\s*+\"(?:name|type|function|id|arguments|parameters)\"\s*+:"
)
# tags of forms that are not read, and of the protocol's where nothing opened them
_FOREIGN = re.compile(
    r"<\|tool_calls?(?:_start|_begin|_section_begin)?\|?>|<｜tool▁calls?▁begin｜>|<\|python_tag\|>|<tool_calls>"
    r"|<function_calls?>|<tool_code>|<(?:\w+:)?invoke name=|</tool_call>|</function>"
)
USE_TAGS = 'a call must be written as <tool_call>{"name": a string, "arguments": an object}</tool_call>'
# tags of a block whose JSON may be a call
CALL_BLOCKS = frozenset({"", "json", "jsonc", "tool", "tool_call", "tool_calls", "function_call"})

# models write the newlines of a program as they are
_DECODER = json.JSONDecoder(strict=False)
_BRACKET = re.compile(r"[\[{]")
_BLANK = re.compile(r"\s*+")
_MORE = re.compile(r"\s*+;\s*+(?=\{)")
_HAS_NAME, _HAS_ARGUMENTS = re.compile(r'"name"\s*+:'), re.compile(r'"(?:arguments|parameters)"\s*+:')
_MAX_HEAD = 600
_INLINE = re.compile(r'\{\s*+"(?:name|arguments|parameters)"\s*+:')
_MAX_INLINE = 64
_MISTRAL_NAME = re.compile(r"\s*+([\w.:-]{1,200}+)(?:\[CALL_ID\][\w-]{1,200}+)?(?:\[ARGS\])?\s*+(?=\{)")
_FUNCTION = re.compile(r"\s*+<function=([^<>\n]{1,200})>")
_FUNCTION_END = re.compile(r"\s*+</function>")
_PARAMETER = re.compile(r"\s*+<parameter=([^<>\n]{1,200})>\n?")
_NAME = re.compile(r"\s*+([A-Za-z_][\w.-]{0,200}+)\s*+(?=<arg_key>|\Z)")
_KEY = re.compile(r"\s*+<arg_key>([^<>\n]{1,200})</arg_key>\s*+<arg_value>")
_USE_LIST = 'a call must be [TOOL_CALLS] and a list of {"name": a string, "arguments": an object}'
_USE_XML = "a call must be <function=name>, then <parameter=name>value</parameter> for each argument, then </function>"


class OwnCalls(NamedTuple):
    """Calls in a model's own form, and where their text ends; a malformed one has its error."""

    calls: tuple[ToolCall, ...]
    end: int


def call_in_tags(body: str) -> ToolCall:
    """The call that stands between <tool_call> and </tool_call>. Never raises: a malformed call has its error.

    >>> call_in_tags('{"name": "add", "parameters": {"a": 1}}').arguments
    {'a': 1}
    >>> call_in_tags("<function=add><parameter=a>1</parameter></function>").arguments
    {'a': '1'}
    """
    if function := _FUNCTION.match(body):
        return _xml_call(body, function).calls[0]
    if (name := _NAME.match(body)) is not None:
        return _keyed_call(body, name)
    try:
        return _call_of(json.loads(body, strict=False))
    except (ValueError, RecursionError) as error:
        return malformed(_flaw(error))


def read_own(text: str, start: int) -> OwnCalls | None:
    """The calls whose form opens at `start`, where OWN_OPENING matches; None where nothing there is meant as a call."""
    if text.startswith("[TOOL_CALLS]", start):
        return _mistral_calls(text, start + len("[TOOL_CALLS]"))
    if function := _FUNCTION.match(text, start):
        return _xml_call(text, function)
    bracket = _BRACKET.search(text, start)
    return None if bracket is None else _json_calls(text, bracket.start())


def block_calls(body: str) -> tuple[ToolCall, ...]:
    """The calls that a block of JSON makes; none where it holds something else."""
    bracket = _BLANK.match(body)
    found = read_own(body, bracket.end()) if bracket is not None and body[bracket.end() : bracket.end() + 1] else None
    return () if found is None or body[found.end :].strip() else found.calls


def _json_calls(text: str, start: int) -> OwnCalls | None:
    """Objects of JSON, one or several with ; between or in a list, that name a tool and its arguments."""
    calls: list[ToolCall] = []
    while True:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            if not _is_attempt(text, start):
                return OwnCalls(tuple(calls), start) if calls else None
            line_end = text.find("\n", start)
            return OwnCalls((*calls, malformed(_flaw(error, start))), line_end if line_end >= 0 else len(text))
        found = value if isinstance(value, list) else [value]
        if not found or not all(map(_is_call, found)):
            return OwnCalls(tuple(calls), start) if calls else None
        calls += map(_call_of, found)
        more = _MORE.match(text, end)
        if more is None:
            return OwnCalls(tuple(calls), end)
        start = more.end()


def _mistral_calls(text: str, start: int) -> OwnCalls:
    name = _MISTRAL_NAME.match(text, start)
    blank = _BLANK.match(text, start)
    begin = name.end() if name else blank.end() if blank else start
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        is_json = name is not None or text[begin : begin + 1] in ("[", "{")
        return OwnCalls((malformed(_flaw(error, begin) if is_json else _USE_LIST),), start)
    if name:
        return OwnCalls((_call_of({"name": name[1], "arguments": value}),), end)
    found = value if isinstance(value, list) else [value]
    return OwnCalls(tuple(map(_call_of, found)) or (malformed(_USE_LIST),), end)


def _xml_call(text: str, function: re.Match[str]) -> OwnCalls:
    arguments: dict[str, Any] = {}
    position = function.end()
    if text[position : position + 200].lstrip().startswith("{"):
        # Llama 3.1 writes JSON between these tags
        blank = _BLANK.match(text, position)
        try:
            value, position = _DECODER.raw_decode(text, blank.end() if blank else position)
        except (ValueError, RecursionError) as error:
            return OwnCalls((malformed(_flaw(error, position)),), position)
        closed = _FUNCTION_END.match(text, position)
        call = _call_of({"name": function[1].strip(), "arguments": value})
        return OwnCalls((call if closed else malformed(_USE_XML),), closed.end() if closed else position)
    while parameter := _PARAMETER.match(text, position):
        stop = text.find("</parameter>", parameter.end())
        if stop < 0:
            return OwnCalls((malformed(_USE_XML),), position)
        arguments[parameter[1].strip()] = text[parameter.end() : stop].removesuffix("\n")
        position = stop + len("</parameter>")
    closed = _FUNCTION_END.match(text, position)
    if closed is None:
        return OwnCalls((malformed(_USE_XML),), position)
    return OwnCalls((ToolCall(function[1].strip(), arguments, is_text=True),), closed.end())


def _keyed_call(body: str, name: re.Match[str]) -> ToolCall:
    arguments: dict[str, Any] = {}
    position = name.end()
    while key := _KEY.match(body, position):
        stop = body.find("</arg_value>", key.end())
        if stop < 0:
            break
        arguments[key[1].strip()] = body[key.end() : stop]
        position = stop + len("</arg_value>")
    if body[position:].strip():
        return malformed("a call must have <arg_key>name</arg_key><arg_value>value</arg_value> for each argument")
    return ToolCall(name[1], arguments, is_text=True)


def is_unread(text: str) -> bool:
    """Whether a text that made no call was meant to make one."""
    return _FOREIGN.search(text) is not None or any(_is_attempt(text, found.start()) for found in _inline_objects(text))


def _inline_objects(text: str) -> Iterator[re.Match[str]]:
    return islice(_INLINE.finditer(text), _MAX_INLINE)


def _is_attempt(text: str, start: int) -> bool:
    end = start + _MAX_HEAD
    return bool(_HAS_NAME.search(text, start, end) and _HAS_ARGUMENTS.search(text, start, end))


def _is_call(value: Any) -> bool:
    """Whether a value of JSON, without tags around it, is a call and not an answer."""
    call = _unwrapped(value)
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and not {"arguments", "parameters"}.isdisjoint(call)
    )


def _unwrapped(value: Any) -> Any:
    """The OpenAI API puts a call into an object of its own."""
    is_wrapped = isinstance(value, dict) and isinstance(value.get("function"), dict)
    return value["function"] if is_wrapped else value


def _call_of(value: Any) -> ToolCall:
    call = _unwrapped(value)
    if isinstance(call, dict) and {"arguments", "parameters"}.isdisjoint(call):
        return malformed('the call must have the keys "name" and "arguments"')
    arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
    if isinstance(arguments, str):
        # some models write the arguments as the OpenAI API does, as a string of JSON
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError) as error:
            return malformed(_flaw(error))
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return malformed('the call must be {"name": a string, "arguments": an object}')
    return ToolCall(name=call["name"], arguments=arguments)


def _flaw(error: Exception, start: int = 0) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"the call is not valid JSON: {error.msg} at character {error.pos - start}"
    # a number of thousands of digits, or brackets nested as deep
    return f"the call is not JSON that can be read: {error}"


def malformed(message: str) -> ToolCall:
    return ToolCall(name="", arguments={}, error=message)
