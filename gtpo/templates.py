"""What a chat template can do, found by trial with made-up conversations before any task is seen.

Templates differ in which roles they take, whether two messages of one role may follow each other, and what ends a turn.
What one does not take is fitted to it: system text goes into the first user message, neighbours join in one message.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtpo.types import Message, ToolSchema

_MARK = "\x00tool-output\x00"
_QUESTION, _REPLY = "the-question", "the-reply"
_JOINT = "\n\n"
# a thought at the end of what stands before a reply: templates open one, or write an empty one, for the last turn only
_THOUGHT = re.compile(
    r"<(?P<name>(?:\w+:)?(?:think|thinking|thought)|\|channel)>(?:thought)?\s*+(?:(?:</(?P=name)>|<channel\|>)\s*+)?\Z"
)
_MAX_SHOWN = 200
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")


class TemplateFault(ValueError):
    """The chat template raises for some messages, or leaves one out."""


class BrokenPrefix(TemplateFault):
    """The chat template does not extend what it rendered before, so ids could not be appended token-in, token-out."""


@dataclass(frozen=True)
class Seam:
    """What a template writes behind a completion: `end`, the token that ends the turn, then `pieces`, the text before,
    between and after the messages that follow."""

    end: str
    pieces: list[str]


class ChatTemplate:
    """The chat template of one tokenizer. stop_ids: those that end a turn beside eos_token. kwargs: its own variables.
    with_tools: of several templates take the one for tools.

    Raises ValueError where the template takes no conversation at all, or does not know one of `kwargs`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Collection[int] = (),
        kwargs: Mapping[str, Any] | None = None,
        with_tools: bool = False,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the model's tokenizer must have a chat template, got none; set tokenizer.chat_template and save it"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer must have an end-of-turn token (eos_token), got none")
        self._tokenizer = tokenizer
        try:
            self._template = str(tokenizer.get_chat_template(tools=[] if with_tools else None))
        except ValueError as error:
            raise TemplateFault(f"the chat template must be one: {' '.join(str(error).split())}") from error
        self._kwargs = dict(kwargs or {})
        self._refuse_unknown(self._kwargs)
        added = tokenizer.added_tokens_decoder
        # an id of the vocabulary that stops the sampling is a piece of text, and marks no turn
        self._stops = {token.content for number, token in added.items() if number in stop_ids}
        special = {token.content for token in added.values() if token.special}
        special |= {*tokenizer.all_special_tokens, *self._stops}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._fits: dict[tuple[str | bool, ...], int] = {}
        self._seams: dict[tuple[str, ...], Seam] = {}
        self._in_parts = False
        self._in_parts = not self._takes_text()
        self._opening = [Message("user", _QUESTION), Message("assistant", _REPLY)]
        self.prompt(self._opening[:1])
        self._takes_system = self._find_fit([Message("system", ""), *self._opening[:1]]) == 0
        self._rendered = self.render(self._opening, add_generation_prompt=False)
        self._closing = self._rendered.rpartition(_REPLY)[2]

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The text before the first sampled token. Raises TemplateFault where no way shows the messages as text."""
        kind = (bool(tools), *(message.role for message in messages))
        if kind not in self._fits:
            self._fits[kind] = self._find_fit(messages, tools)
        return self.render(list(_prompt_fits(messages))[self._fits[kind]], add_generation_prompt=True, tools=tools)

    def seam(self, roles: tuple[str, ...]) -> Seam:
        """What stands around messages of `roles` that follow a completion. Raises TemplateFault where there is none."""
        if roles not in self._seams:
            self._seams[roles] = self._find_seam(roles)
        return self._seams[roles]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[ToolSchema] = ()
    ) -> str:
        return self._apply(
            [{"role": message.role, "content": self._content(message.content)} for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )

    def offers(self, tool: ToolSchema) -> bool:
        """Whether the template tells the model of `tool` when it gets its schema."""
        name, question = tool["function"]["name"], self._opening[:1]
        try:
            return name in self.prompt(question, [tool]) and name not in self.prompt(question)
        except TemplateFault:
            return False

    def written_call(self, tool: ToolSchema, arguments: Mapping[str, Any]) -> str | None:
        """What the template writes in a turn that calls `tool`, without the token that ends it; None where it writes no
        such turn, or ends it with a token that is not known to end one."""
        call = {"name": tool["function"]["name"], "arguments": dict(arguments)}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": self._content(_QUESTION)},
            {
                "role": "assistant",
                "content": self._content(""),
                "tool_calls": [{"id": "call00000", "type": "function", "function": call}],
            },
        ]
        try:
            before = self.prompt(self._opening[:1], [tool])
            whole = self._apply(messages, add_generation_prompt=False, tools=[tool])
        except TemplateFault:
            return None
        num_alike = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        text = whole[min(num_alike, len(whole)) :]
        ends = {self._tokenizer.eos_token, *self._stops} | {seam.end for seam in self._seams.values()}
        cut = min((place for end in ends if (place := text.rfind(end)) >= 0), default=len(text))
        return None if cut == len(text) and self._special.search(text, text.rfind(call["name"])) else text[:cut]

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: Sequence[ToolSchema]
    ) -> str:
        offered = {"tools": [dict(tool) for tool in tools]} if tools else {}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **offered,
                    **self._kwargs,
                )
            )
        # a template is a program of its own: it raises what it likes
        except Exception as error:
            reason = " ".join(str(error).split())[:_MAX_SHOWN] or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateFault(f"the chat template raises {reason!r} for messages of roles {roles}") from error

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._in_parts else text

    def _takes_text(self) -> bool:
        """Whether a content is a text; templates of models that see read a list of parts."""
        for self._in_parts in (False, True):
            try:
                if _MARK in self.render([Message("user", _MARK)], add_generation_prompt=True):
                    return not self._in_parts
            except TemplateFault:
                continue
        return True

    def _refuse_unknown(self, kwargs: Mapping[str, Any]) -> None:
        known = _names_in(self._template) - set(_OWN_VARIABLES) if kwargs else set()
        for name, value in kwargs.items():
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"chat.template_kwargs must hold variables of the chat template, got {name!r}{hint}")
            try:
                json.dumps(value)
            except TypeError:
                kind = type(value).__name__
                raise ValueError(
                    f"chat.template_kwargs.{name} must be a text, number, true, false, list or table, got a {kind}"
                ) from None

    def _find_fit(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> int:
        """The number of the first of `_prompt_fits` that the template takes, keeping every message."""
        marks = [f"\x00message {number}\x00" for number in range(len(messages))]
        marked = [Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)]
        fault = TemplateFault("the chat template must keep every message of the prompt, got none")
        for number, fitted in enumerate(_prompt_fits(marked)):
            try:
                rendered = self.render(fitted, add_generation_prompt=True, tools=tools)
            except TemplateFault as raised:
                fault = raised if number == 0 else fault
                continue
            if split_at(rendered, marks) is not None:
                return number
            if number == 0:
                fault = TemplateFault(
                    f"the chat template must keep every message of the prompt, got {_shown(rendered)}"
                )
        raise fault

    def _find_seam(self, roles: tuple[str, ...]) -> Seam:
        taken = ("user" if role == "system" and not self._takes_system else role for role in roles)
        said = [Message(role, _MARK) for role in taken]  # type: ignore[arg-type]
        faults = []
        for fitted in (said, _joined(said), [Message(said[0].role, _JOINT.join([_MARK] * len(said)))]):
            try:
                return self._seam_of(fitted, num=len(roles))
            except TemplateFault as fault:
                faults.append(fault)
        raise faults[0]

    def _seam_of(self, said: Sequence[Message], *, num: int) -> Seam:
        whole = self.render([*self._opening, *said], add_generation_prompt=True)
        roles = ", ".join(message.role for message in said)
        pieces = whole.split(_MARK)
        if len(pieces) != num + 1:
            raise TemplateFault(f"the chat template drops messages of role {roles!r}")
        start = pieces[0].rfind(_REPLY)
        behind = pieces[0][start + len(_REPLY) :]
        end = self._end_in(behind) if start >= 0 else None
        stands, generation, closed = map(_without_thought, (pieces[0][:start], *self._befores()))
        if start < 0 or _QUESTION not in stands or stands not in (generation, closed):
            expected = " or ".join(repr(text + _REPLY) for text in self._befores())
            raise BrokenPrefix(
                "the chat template must keep earlier turns as they were rendered; "
                f"expected a conversation starting with {expected}, got {_shown(whole)}"
            )
        if end is None:
            raise BrokenPrefix(
                f"the chat template must end an assistant turn with eos_token {self._tokenizer.eos_token!r} or another "
                "special token, the same in the middle and at the end; "
                f"got {_shown(behind)} and {_shown(self._closing)}"
            )
        if stands != generation and (control := self._special.search(stands.removeprefix(generation))):
            raise TemplateFault(
                f"the chat template puts {control[0]!r} between its generation prompt and a reply, where a completion "
                "begins; it needs a generation prompt that holds all control tokens before a reply"
            )
        return Seam(end, [behind[behind.index(end) + len(end) :], *pieces[1:]])

    def _befores(self) -> list[str]:
        """What may stand before a reply: the generation prompt, or what the template writes there later."""
        generation = self.render(self._opening[:1], add_generation_prompt=True)
        return [generation, self._rendered[: self._rendered.rfind(_REPLY)]]

    def _end_in(self, behind: str) -> str | None:
        """The token that ends a turn, in what stands between a reply and the next message: eos_token, else one that
        stops the sampling, else one with which the template closes the last turn too."""
        found = self._special.findall(behind)
        if (eos := self._tokenizer.eos_token) in found:
            return str(eos)
        ends = [token for token in found if token in self._stops]
        ends += [token for token in found[:1] if token in self._closing]
        return next(iter(ends), None)


def _names_in(template: str) -> set[str]:
    """The variables that a template names, its own ones included.

    >>> sorted(_names_in("think {% if thinking %}{{ m.content }}{% endif %}") - {"if", "endif"})
    ['m', 'thinking']
    """
    import jinja2

    try:
        tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateError as error:
        raise TemplateFault(f"the chat template is not valid Jinja: {' '.join(str(error).split())}") from error
    before = ["", *(value for _, value in tokens)]
    return {value for (kind, value), last in zip(tokens, before, strict=False) if kind == "name" and last != "."}


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"...{text[-_MAX_SHOWN:]}")


def _without_thought(text: str) -> str:
    """
    >>> [_without_thought(text) for text in ("<|assistant|><think>\\n", "<think>\\n\\n</think>\\n\\n", "a <think> b")]
    ['<|assistant|>', '', 'a <think> b']
    """
    return _THOUGHT.sub("", text)


def _prompt_fits(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Ways of giving messages to a template, from what they are to what every template takes."""
    yield list(messages)
    yield _joined(messages)
    yield _without_system(messages)
    yield _joined(_without_system(messages))


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """System text as the beginning of the user message that follows it.

    >>> _without_system([Message("system", "Be brief."), Message("user", "2 + 2?")])
    [Message(role='user', content='Be brief.\\n\\n2 + 2?')]
    """
    fitted: list[Message] = []
    system: list[str] = []
    for message in messages:
        if message.role == "system":
            system.append(message.content)
        elif message.role == "user" and system:
            fitted.append(Message("user", _JOINT.join([*system, message.content])))
            system = []
        else:
            fitted.append(message)
    return [*fitted, Message("user", _JOINT.join(system))] if system else fitted


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role in one message.

    >>> _joined([Message("user", "a"), Message("user", "b"), Message("assistant", "c")])
    [Message(role='user', content='a\\n\\nb'), Message(role='assistant', content='c')]
    """
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            joined[-1] = Message(message.role, joined[-1].content + _JOINT + message.content)
        else:
            joined.append(message)
    return joined


def split_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """`text` before, between and after `marks`; None unless each stands there once, in this order.

    >>> split_at("a1b2c", ["1", "2"]), split_at("a2b1c", ["1", "2"])
    (['a', 'b', 'c'], None)
    """
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return None if any(mark in piece for piece in pieces for mark in marks) else [*pieces, text]
