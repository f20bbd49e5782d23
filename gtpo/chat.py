"""Text to token ids and back at the borders of a turn: prompts, tool output and completions.

A conversation is rendered once, for its prompt. After that ids are only appended: the sampled completion as it is, then
the template's glue around the tool output. The glue is found by rendering a made-up conversation, so a template that
rewrites earlier turns (and would thus break the prefix) is refused at the start, as `gtpo.templates` says.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gtpo.parsing import CallFormat, ParsedTurn, opens_thought, parse_turn
from gtpo.templates import ChatTemplate, TemplateFault
from gtpo.token_ids import TokenIds
from gtpo.types import Message, ToolCall, ToolSchema

_ANSWER_PROTOCOL = "Give the result as: answer: ..."
_PROBE_CALL = ToolCall("probe_tool", {"city": "Rome", "days": 3})
_PROBE = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Says what the weather will be.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "integer", "description": "how long"},
            },
            "required": ["city", "days"],
        },
    },
}
# ids in which a generation prompt opens a thought: of a tokenizer of bytes, at most
_MAX_OPENING = 64
_CODE_PROTOCOL = (
    "Call Python with a block that opens with ```python and closes with ```. You then read what it printed.\n"
)


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


class Chat:
    """The chat template of one tokenizer, in one call format.

    stop_ids: ids that end a turn beside that of `eos_token`, as the model's generation config lists them.
    max_calls_per_turn, reasoning_may_call: as `parse_turn` takes them. template_kwargs: variables of the template.
    end_of_turn_id: what a demonstration writes at the end of a turn: `eos_token` if the template does, else the token
    that it writes there. opens_thought: whether a completion begins in a thought, which the generation prompt opened.
    offers_tools: whether the template itself tells the model of tools, in the format "json"; it does if a call that it
    writes is read back. The template must keep earlier turns; docs/models.md lists families of which that is known.
    Raises ValueError, in one line, where it does not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        call_format: CallFormat = "code",
        tool_role: str = "tool",
        stop_ids: Collection[int] = (),
        max_calls_per_turn: int = 8,
        reasoning_may_call: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = ChatTemplate(
            tokenizer, stop_ids=stop_ids, kwargs=template_kwargs, with_tools=call_format == "json"
        )
        self.tokenizer = tokenizer
        self.tokens = TokenIds(tokenizer)
        self.call_format = call_format
        self.tool_role = tool_role
        self.max_calls_per_turn = max_calls_per_turn
        self.reasoning_may_call = reasoning_may_call
        self._check_replies()
        seam = self.template.seam((tool_role,))
        self.end_of_turn_id: int = tokenizer.convert_tokens_to_ids(seam.end)
        self.stop_ids = frozenset({self.end_of_turn_id, tokenizer.eos_token_id, *stop_ids})
        self.offers_tools = (
            call_format == "json" and self.template.offers(_PROBE) and self._in_own_form(_PROBE_CALL) is not None
        )
        generation = self.template.prompt([Message("user", "question")])
        self.opens_thought = opens_thought(generation)
        # DeepSeek's template goes on behind tool output, without the thought that its prompt opens
        self._opens_alike = all(
            opens_thought(self.template.seam(roles).pieces[-1]) == self.opens_thought for roles in _replies(tool_role)
        )

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
        offered = [_without_return(tool) for tool in tools] if self.offers_tools else []
        hidden: dict[str, str] = {}
        if self.tokens.has_control(json.dumps(offered, ensure_ascii=False)):
            offered = [self._hidden(tool, hidden) for tool in offered]
        if any(self.tokens.has_control(message.content) for message in messages):
            marks = {f"\x00message {number}\x00": message for number, message in enumerate(messages)}
            hidden |= {mark: message.content for mark, message in marks.items()}
            messages = [Message(message.role, mark) for mark, message in marks.items()]
        rendered = self.template.prompt(messages, offered)
        if not hidden:
            return self.tokens.whole(rendered)
        first, *rest = re.split(f"({'|'.join(map(re.escape, hidden))})", rendered)
        return self.tokens.whole(first) + self._interleaved([hidden[mark] for mark in rest[::2]], rest[1::2])

    def _hidden(self, value: Any, hidden: dict[str, str]) -> Any:
        """A schema with a mark for each of its texts that hold a control token; `hidden` gets these, by their mark."""
        if isinstance(value, Mapping):
            return {self._hidden(key, hidden): self._hidden(item, hidden) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item, hidden) for item in value]
        if not isinstance(value, str) or not self.tokens.has_control(value):
            return value
        # letters and digits: whatever a template makes of a text, it leaves them
        mark = f"HiddenText{len(hidden)}End"
        hidden[mark] = json.dumps(value, ensure_ascii=False)[1:-1]
        return mark

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
        seam = self.template.seam(tuple(message.role for message in said))
        first, *rest = seam.pieces
        contents = [message.content for message in said]
        if not any(map(self.tokens.has_control, contents)):
            text = "".join(content + piece for content, piece in zip(contents, rest, strict=True))
            return self.tokens.behind(seam.end, first + text)
        return self.tokens.behind(seam.end, first) + self._interleaved(contents, rest)

    def _interleaved(self, contents: Sequence[str], glue: Sequence[str]) -> list[int]:
        """Each content, which holds no control token, with the glue behind it."""
        ids: list[int] = []
        for content, piece in zip(contents, glue, strict=True):
            ids += self.tokens.part(content, control=False) + self.tokens.part(piece, control=True)
        return ids

    def _protocol(self, tools: Sequence[ToolSchema], *, explain: bool) -> str:
        if self.call_format == "json" and self.offers_tools and tools:
            return f"\n\n{_ANSWER_PROTOCOL}"
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

    def completion_ids(self, text: str, behind: Sequence[int] | None = None) -> list[int]:
        """Ids of a demonstrated completion, its end-of-turn id included. It does not think: a thought that the
        generation prompt opened is closed first.

        behind: the ids that it follows, the prompt or those of a reply; left out: those of a prompt."""
        text = f"</think>\n\n{text}" if self._is_thinking(behind) else text
        return [*self.tokens.part(text, control=False), self.end_of_turn_id]

    def written_call(self, call: ToolCall) -> str:
        """The text with which a demonstration makes `call`: in the model's own form where the template offers tools."""
        own = self._in_own_form(call) if self.offers_tools else None
        return written_call(call, self.call_format) if own is None else own

    def _in_own_form(self, call: ToolCall) -> str | None:
        """The call as the template writes it; None unless it is read back as it is."""
        function = {"name": call.name, "description": "", "parameters": {"type": "object", "properties": {}}}
        text = self.template.written_call({"type": "function", "function": function}, call.arguments)
        turn = parse_turn(text or "", call_format="json", max_calls=2)
        read = [(found.name, _texts(found.arguments)) for found in turn.calls]
        return turn.said.strip() if read == [(call.name, _texts(call.arguments))] else None

    def decode(self, completion_ids: Sequence[int]) -> str:
        ids = [token for token in completion_ids if token not in self.stop_ids]
        return self.tokens.decode(ids)

    def parse(self, text: str, behind: Sequence[int] | None = None) -> ParsedTurn:
        """Reads the calls, or else the answer, out of a completion. Never raises: a malformed call has its error.

        behind: as `completion_ids` takes it."""
        return parse_turn(
            text,
            call_format=self.call_format,
            max_calls=self.max_calls_per_turn,
            is_thinking=self._is_thinking(behind),
            reasoning_may_call=self.reasoning_may_call,
        )

    def _check_replies(self) -> None:
        """Raises where the template cannot take what follows a turn: tool output, one or several, and messages."""
        try:
            self._try_replies(self.tool_role)
        except TemplateFault as fault:
            if self.tool_role == "user":
                raise
            try:
                self._try_replies("user")
            except TemplateFault as other:
                if str(other) == str(fault):
                    raise
                raise type(fault)(f'{fault}; with rollout.tool_role = "user", {other}') from fault
            raise type(fault)(f'{fault}; set rollout.tool_role = "user"') from fault

    def _try_replies(self, tool_role: str) -> None:
        for roles in _replies(tool_role):
            self.template.seam(roles)

    def _is_thinking(self, behind: Sequence[int] | None) -> bool:
        if behind is None or self._opens_alike:
            return self.opens_thought
        return opens_thought(self.tokens.decode(behind[-_MAX_OPENING:]))


def _replies(tool_role: str) -> tuple[tuple[str, ...], ...]:
    """Roles of messages that may follow a turn; others are fitted to these."""
    return (tool_role,), (tool_role, tool_role), (tool_role, "user"), ("user",), ("user", "user")


def _texts(arguments: Mapping[str, Any]) -> dict[str, str]:
    # some forms write every value as text
    return {name: str(value) for name, value in arguments.items()}


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
