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
from gtpo.types import ToolCall

_FENCED_CODE = re.compile(r"```py(?:thon)?3?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
# quotes, which call nothing
_FENCED_TEXT = re.compile(r"```(?:text|txt|output|json|markdown)[ \t]*\r?\n.*?```", re.DOTALL | re.IGNORECASE)
_JSON_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"answer:[ \t]*(\S[^\n]*)", re.IGNORECASE)
_MARK = "\x00tool-output\x00"
_SYSTEM_MARK, _PROMPT_MARK = "\x00system\x00", "\x00prompt\x00"
_ANSWER_PROTOCOL = "Give the result as: answer: ..."
_CODE_PROTOCOL = (
    "Call Python with a block that opens with ```python and closes with ```. You then read what it printed.\n"
)


class BrokenPrefix(ValueError):
    """The chat template does not extend what it rendered before, so ids could not be appended token-in, token-out."""


@dataclass(frozen=True)
class ParsedTurn:
    """What a completion asks for: calls (malformed ones included), else an answer, else neither (a void turn)."""

    calls: tuple[ToolCall, ...]
    answer: str | None


class Chat:
    """The chat template of one tokenizer, in one call format.

    schemas: the tools offered in the format "json". explain_protocol: tell the model in the system prompt how to call
    Python in the format "code" and how to answer; the format "json" always does. stop_ids: ids that end a turn beside
    that of `eos_token`.
    The template must keep the system prompt and earlier turns, and end a turn of the assistant with `eos_token`. Known
    to: Qwen 2.5 to 3.8, LFM2, Nemotron 3, DeepSeek V3; with tool_role "user" also Llama 3, Gemma 4 and Phi 3.
    Raises BrokenPrefix or ValueError where it does not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        call_format: Literal["code", "json"] = "code",
        tool_role: str = "tool",
        schemas: Sequence[Mapping[str, Any]] = (),
        explain_protocol: bool = False,
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
        self.schemas = list(schemas)
        self.explain_protocol = explain_protocol
        self.end_of_turn_id: int = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.end_of_turn_id, *stop_ids})
        self._before, self._between, self._after = self._tool_glue()

    def prompt_ids(self, system_prompt: str, prompt: str) -> list[int]:
        """Ids of everything before the first sampled token, the generation prompt included.

        The text of the prompts never becomes a special token.
        """
        system = system_prompt + self._protocol()
        tokens = self.tokens
        if not (tokens.has_control(system) or tokens.has_control(prompt)):
            return tokens.whole(self._render_prompt(system, prompt))
        rendered = self._render_prompt(_SYSTEM_MARK, _PROMPT_MARK)
        before, system_mark, rest = rendered.partition(_SYSTEM_MARK)
        between, prompt_mark, after = rest.partition(_PROMPT_MARK)
        if not (system_mark and prompt_mark):
            raise ValueError(f"the chat template must keep the system prompt and the prompt, got {rendered!r}")
        ids = tokens.whole(before) + tokens.part(system, control=False)
        ids += tokens.part(between, control=True) + tokens.part(prompt, control=False)
        return ids + tokens.part(after, control=True)

    def tool_ids(self, outputs: Sequence[str]) -> list[int]:
        """Ids inserted after a completion that ended its turn: those that the whole text has there.

        A tool's text never becomes a special token; an added token that is not special, as Qwen's <tool_call>, it can.
        """
        tokens, end = self.tokens, self.tokenizer.eos_token
        if not any(map(tokens.has_control, outputs)):
            return tokens.behind(end, self._before + self._between.join(outputs) + self._after)
        ids = tokens.behind(end, self._before)
        for number, output in enumerate(outputs):
            if number:
                ids += tokens.part(self._between, control=True)
            ids += tokens.part(output, control=False)
        return ids + tokens.part(self._after, control=True)

    def _protocol(self) -> str:
        if self.call_format == "json":
            tools = "\n".join(json.dumps(_without_return(schema), sort_keys=True) for schema in self.schemas)
            return (
                f"\n\nTools, as JSON schemas:\n{tools}\n\nCall a tool with a JSON object inside tags:\n"
                f'<tool_call>{{"name": "tool", "arguments": {{}}}}</tool_call>\n{_ANSWER_PROTOCOL}'
            )
        return f"\n\n{_CODE_PROTOCOL}{_ANSWER_PROTOCOL}" if self.explain_protocol else ""

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a demonstrated completion, its end-of-turn id included."""
        return [*self.tokens.part(text, control=False), self.end_of_turn_id]

    def decode(self, completion_ids: Sequence[int]) -> str:
        ids = [token for token in completion_ids if token not in self.stop_ids]
        return self.tokens.decode(ids)

    def render_code_call(self, code: str) -> str:
        """The text with which a demonstration calls the Python tool."""
        if self.call_format == "code":
            return f"```python\n{code}\n```"
        return f"<tool_call>{json.dumps({'name': 'python', 'arguments': {'code': code}})}</tool_call>"

    def render_answer(self, answer: str) -> str:
        return f"answer: {answer}"

    def parse(self, text: str) -> ParsedTurn:
        """Reads the calls, or else the answer, out of a completion. Never raises: a malformed call has its error."""
        calls = _fenced_calls(text) if self.call_format == "code" else _json_calls(text)
        if calls:
            return ParsedTurn(calls=calls, answer=None)
        answers = _ANSWER.findall(text)
        return ParsedTurn(calls=(), answer=(_bare(answers[-1]) or None) if answers else None)

    def _tool_glue(self) -> tuple[str, str, str]:
        opening = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
        outputs = [{"role": self.tool_role, "content": _MARK}, {"role": self.tool_role, "content": _MARK}]
        end = self.tokenizer.eos_token
        rendered = self._render(opening, add_generation_prompt=False)
        if end not in rendered[rendered.rindex("reply") :]:
            raise BrokenPrefix(f"the chat template must end an assistant turn with eos_token {end!r}, got {rendered!r}")
        one = self._render([*opening, outputs[0]], add_generation_prompt=True)
        two = self._render([*opening, *outputs], add_generation_prompt=True)
        # an earlier turn must stand as the template closed it, or as it was sampled: Qwen3 puts an empty <think> into
        # the last turn only, and no turn that is appended here has it
        closed = rendered[: rendered.index(end, rendered.rindex("reply")) + len(end)]
        appended = self._render(opening[:1], add_generation_prompt=True) + "reply" + end
        prefix = closed if one.startswith(closed) else appended
        if not (one.startswith(prefix) and two.startswith(prefix)):
            raise BrokenPrefix(
                "the chat template must keep earlier turns as they were rendered; "
                f"expected a conversation starting with {closed!r} or {appended!r}, got {one!r}"
            )
        if one.count(_MARK) != 1 or two.count(_MARK) != 2:
            raise ValueError(
                f'the chat template drops messages of role {self.tool_role!r}; set rollout.tool_role = "user"'
            )
        before, after = one[len(prefix) :].split(_MARK)
        return before, two[len(prefix) :].split(_MARK)[1], after

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _render_prompt(self, system: str, prompt: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return self._render(messages, add_generation_prompt=True)


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
