"""Text to token ids and back at the borders of a turn: prompts, tool output, calls and answers.

A conversation is rendered once, for its prompt. After that ids are only appended: the sampled completion as it is, then
the template's glue around the tool output. The glue is found by rendering a made-up conversation, so a template that
rewrites earlier turns (and would thus break the prefix) is refused at the start.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gtpo.token_ids import TokenIds
from gtpo.types import Message, ToolCall, ToolSchema

_FENCED_CODE = re.compile(r"```py(?:thon)?3?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
# quotes, which call nothing
_FENCED_TEXT = re.compile(r"```(?:text|txt|output|json|markdown)[ \t]*\r?\n.*?```", re.DOTALL | re.IGNORECASE)
_JSON_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"answer:[ \t]*(\S[^\n]*)", re.IGNORECASE)
_MARK = "\x00tool-output\x00"
_ANSWER_PROTOCOL = "Give the result as: answer: ..."
_CODE_PROTOCOL = (
    "Call Python with a block that opens with ```python and closes with ```. You then read what it printed.\n"
)


CallFormat = Literal["code", "json"]


def written_call(call: ToolCall, call_format: CallFormat) -> str:
    """The text with which a demonstration makes `call`.

    >>> written_call(ToolCall("add", {"a": 1}), "code")
    '```python\\nprint(add(a=1))\\n```'
    """
    if call_format == "json":
        return f"<tool_call>{json.dumps({'name': call.name, 'arguments': dict(call.arguments)})}</tool_call>"
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    code = call.code if call.name == "python" else f"print({call.name}({arguments}))"
    return f"```python\n{code}\n```"


def written_answer(answer: str) -> str:
    """The text with which a demonstration answers."""
    return f"answer: {answer}"


class _DroppedMessage(ValueError):
    """The chat template left out a message."""


class BrokenPrefix(ValueError):
    """The chat template does not extend what it rendered before, so ids could not be appended token-in, token-out."""


@dataclass(frozen=True)
class ParsedTurn:
    """What a completion asks for: calls (malformed ones included), else an answer, else neither (a void turn)."""

    calls: tuple[ToolCall, ...]
    answer: str | None


class Chat:
    """The chat template of one tokenizer, in one call format.

    stop_ids: ids that end a turn beside that of `eos_token`.
    The template must keep the system prompt and earlier turns, and end a turn of the assistant with `eos_token`. Known
    to: Qwen 2.5 to 3.8, LFM2, Nemotron 3, DeepSeek V3; with tool_role "user" also Llama 3, Gemma 4 and Phi 3.
    Raises BrokenPrefix or ValueError where it does not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        call_format: CallFormat = "code",
        tool_role: str = "tool",
        stop_ids: Collection[int] = (),
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the model's tokenizer must have a chat template, got none; set tokenizer.chat_template and save it"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer must have an end-of-turn token (eos_token), got none")
        self.tokenizer = tokenizer
        self.tokens = TokenIds(tokenizer)
        self.call_format = call_format
        self.tool_role = tool_role
        self.end_of_turn_id: int = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.end_of_turn_id, *stop_ids})
        self._glue: dict[tuple[str, ...], list[str]] = {}
        self._check_tool_glue()

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, explain_protocol: bool = False
    ) -> list[int]:
        """Ids of everything before the first sampled token, the generation prompt included.

        tools: those of the task. explain_protocol: tell the model in the system prompt how to call Python in the format
        "code" and how to answer; the format "json" always does. The text of a message never becomes a special token.
        """
        if protocol := self._protocol(tools, explain=explain_protocol):
            has_system = messages[0].role == "system"
            system = (messages[0].content if has_system else "") + protocol
            messages = [Message("system", system if has_system else system.lstrip()), *messages[has_system:]]
        contents = [message.content for message in messages]
        if not any(map(self.tokens.has_control, contents)):
            return self.tokens.whole(self._render(messages, add_generation_prompt=True))
        marks = [f"\x00message {number}\x00" for number in range(len(messages))]
        marked = [Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)]
        rendered = self._render(marked, add_generation_prompt=True)
        pieces = _split_at(rendered, marks)
        if pieces is None:
            raise ValueError(f"the chat template must keep every message of the prompt, got {rendered!r}")
        return self.tokens.whole(pieces[0]) + self._interleaved(contents, pieces[1:])

    def reply_ids(
        self, outputs: Sequence[str], messages: Sequence[Message] = (), tools: Sequence[ToolSchema] = ()
    ) -> list[int]:
        """Ids inserted after a completion that ended its turn: the tools' outputs, then messages, then new `tools`:
        those that the whole text has there.

        Their text never becomes a special token; an added token that is not special, as Qwen's <tool_call>, it can.
        """
        said = [Message(self.tool_role, output) for output in outputs]  # type: ignore[arg-type]
        said += messages
        if tools:
            said.append(Message("user", f"New tools:{self._tool_lines(tools)}"))
        first, *rest = self._glue_of(tuple(message.role for message in said))
        contents = [message.content for message in said]
        end = self.tokenizer.eos_token
        if not any(map(self.tokens.has_control, contents)):
            text = "".join(content + piece for content, piece in zip(contents, rest, strict=True))
            return self.tokens.behind(end, first + text)
        return self.tokens.behind(end, first) + self._interleaved(contents, rest)

    def _interleaved(self, contents: Sequence[str], glue: Sequence[str]) -> list[int]:
        """Each content, which holds no control token, with the glue behind it."""
        ids: list[int] = []
        for content, piece in zip(contents, glue, strict=True):
            ids += self.tokens.part(content, control=False) + self.tokens.part(piece, control=True)
        return ids

    def _protocol(self, tools: Sequence[ToolSchema], *, explain: bool) -> str:
        if self.call_format == "json":
            offered = f"\n\nTools, as JSON schemas:{self._tool_lines(tools)}" if tools else ""
            how = (
                "\n\nCall a tool with a JSON object inside tags:\n"
                '<tool_call>{"name": "tool", "arguments": {}}</tool_call>\n'
            )
            return f"{offered}{how if tools else chr(10) * 2}{_ANSWER_PROTOCOL}"
        if not explain:
            return ""
        lent = [tool for tool in tools if tool["function"]["name"] != "python"]
        functions = f"It can call these functions, which return text:{self._tool_lines(lent)}\n" if lent else ""
        return f"\n\n{_CODE_PROTOCOL}{functions}{_ANSWER_PROTOCOL}"

    def _tool_lines(self, tools: Sequence[ToolSchema]) -> str:
        """What the model reads of tools, a line each."""
        if self.call_format == "json":
            return "".join(f"\n{json.dumps(_without_return(tool), sort_keys=True)}" for tool in tools)
        return "".join(f"\n- {_signature_line(tool['function'])}" for tool in tools)

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a demonstrated completion, its end-of-turn id included."""
        return [*self.tokens.part(text, control=False), self.end_of_turn_id]

    def decode(self, completion_ids: Sequence[int]) -> str:
        ids = [token for token in completion_ids if token not in self.stop_ids]
        return self.tokens.decode(ids)

    def parse(self, text: str) -> ParsedTurn:
        """Reads the calls, or else the answer, out of a completion. Never raises: a malformed call has its error."""
        calls = _fenced_calls(text) if self.call_format == "code" else _json_calls(text)
        if calls:
            return ParsedTurn(calls=calls, answer=None)
        answers = _ANSWER.findall(text)
        return ParsedTurn(calls=(), answer=(_bare(answers[-1]) or None) if answers else None)

    def _check_tool_glue(self) -> None:
        """Raises where the template cannot take tool output after a turn, one or several, without changing the turn."""
        for number in (1, 2):
            try:
                self._glue_of((self.tool_role,) * number)
            except _DroppedMessage as dropped:
                raise ValueError(
                    f'the chat template drops messages of role {self.tool_role!r}; set rollout.tool_role = "user"'
                ) from dropped

    def _glue_of(self, roles: tuple[str, ...]) -> list[str]:
        """What the template puts before, between and after messages of `roles` that follow a completion."""
        if roles not in self._glue:
            self._glue[roles] = self._find_glue(roles)
        return self._glue[roles]

    def _find_glue(self, roles: tuple[str, ...]) -> list[str]:
        opening = [Message("user", "question"), Message("assistant", "reply")]
        end = self.tokenizer.eos_token
        rendered = self._render(opening, add_generation_prompt=False)
        if end not in rendered[rendered.rindex("reply") :]:
            raise BrokenPrefix(f"the chat template must end an assistant turn with eos_token {end!r}, got {rendered!r}")
        said = [Message(role, _MARK) for role in roles]  # type: ignore[arg-type]
        whole = self._render([*opening, *said], add_generation_prompt=True)
        # an earlier turn must stand as the template closed it, or as it was sampled: Qwen3 puts an empty <think> into
        # the last turn only, and no turn that is appended here has it
        closed = rendered[: rendered.index(end, rendered.rindex("reply")) + len(end)]
        appended = self._render(opening[:1], add_generation_prompt=True) + "reply" + end
        prefix = closed if whole.startswith(closed) else appended
        if not whole.startswith(prefix):
            raise BrokenPrefix(
                "the chat template must keep earlier turns as they were rendered; "
                f"expected a conversation starting with {closed!r} or {appended!r}, got {whole!r}"
            )
        pieces = whole[len(prefix) :].split(_MARK)
        if len(pieces) != len(roles) + 1:
            raise _DroppedMessage(f"the chat template must keep messages of roles {list(roles)}, got {whole!r}")
        return pieces

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return str(
            self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        )


def _fenced_calls(text: str) -> tuple[ToolCall, ...]:
    calls = [ToolCall(name="python", arguments={"code": code.strip("\r\n")}) for code in _FENCED_CODE.findall(text)]
    if "```" in _FENCED_TEXT.sub("", _FENCED_CODE.sub("", text)):
        calls.append(_malformed("a code block must open with ```python and close with ```"))
    return tuple(calls)


def _bare(answer: str) -> str:
    """The answer without the emphasis of Markdown around it.

    >>> _bare(" **4** "), _bare("`x = 1`"), _bare("2**3")
    ('4', 'x = 1', '2**3')
    """
    bare = answer.strip().removeprefix("**").removesuffix("**").strip()
    return bare[1:-1].strip() if len(bare) > 1 and bare[0] == bare[-1] == "`" else bare


def _json_calls(text: str) -> tuple[ToolCall, ...]:
    calls = [_json_call(body) for body in _JSON_CALL.findall(text)]
    if "<tool_call>" in _JSON_CALL.sub("", text):
        calls.append(_malformed("a call must be closed with </tool_call>"))
    return tuple(calls)


def _json_call(body: str) -> ToolCall:
    try:
        call = json.loads(body)
        # some models write the arguments as the OpenAI API does, as a string of JSON
        arguments = call["arguments"] if isinstance(call, dict) else None
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        return _malformed(f"the call is not valid JSON: {error.msg} at character {error.pos}")
    except KeyError:
        return _malformed('the call must have the keys "name" and "arguments"')
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits, or brackets nested as deep
        return _malformed(f"the call is not JSON that can be read: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return _malformed('the call must be {"name": a string, "arguments": an object}')
    return ToolCall(name=call["name"], arguments=arguments)


def _malformed(message: str) -> ToolCall:
    return ToolCall(name="", arguments={}, error=message)


def _without_return(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as models know it: `get_json_schema` adds a `return` entry that no chat format has."""
    function = {key: value for key, value in schema["function"].items() if key != "return"}
    return {"type": "function", "function": function}


def _signature_line(function: Mapping[str, Any]) -> str:
    """A function as a line of text.

    >>> parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    >>> _signature_line({"name": "f", "description": "Does it.", "parameters": parameters})
    'f(a: integer, b: string): Does it.'
    """
    properties: Mapping[str, Any] = function.get("parameters", {}).get("properties", {})
    parameters = ", ".join(
        f"{name}: {schema['type']}" if isinstance(schema.get("type"), str) else name
        for name, schema in properties.items()
    )
    return f"{function['name']}({parameters}): {function.get('description', '')}".rstrip(": ")


def _split_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """`text` before, between and after `marks`; None unless each stands there once, in this order.

    >>> _split_at("a1b2c", ["1", "2"]), _split_at("a2b1c", ["1", "2"])
    (['a', 'b', 'c'], None)
    """
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return None if any(mark in piece for piece in pieces for mark in marks) else [*pieces, text]
