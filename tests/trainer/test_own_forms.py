"""Calls in the forms that families of models write by themselves, in the format "json"."""

import asyncio
import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtpo.environments import FunctionEpisode, Grade
from gtpo.parsing import ParsedTurn, parse_turn
from gtpo.parsing.pieces import cut
from gtpo.tools import FunctionTool, Toolbox
from gtpo.types import ToolStatus, Trajectory, Turn
from tests.trainer.chat_families import families, tokenizer_of

FENCE = "`" * 3
JSON = '{"name": "add", "parameters": {"a": 1, "b": "x\\ny"}}'
ADD = ("add", {"a": 1, "b": "x\ny"})


def read(text: str, **options: object) -> ParsedTurn:
    return parse_turn(text, call_format="json", **({"max_calls": 8} | options))  # type: ignore[arg-type]


def made(text: str, **options: object) -> list[tuple[str, object]]:
    turn = read(text, **options)
    assert turn.answer is None and all(call.error is None for call in turn.calls), turn
    return [(call.name, call.arguments) for call in turn.calls]


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"I add.\n  {JSON}\nThen I see.",
        f"<think>so</think>{JSON}",
        f"<|python_tag|>{JSON}",
        f"Well. <|tool_call|>[{JSON}]<|/tool_call|>",
        f"<|tool_call|>\n{JSON}",
        '{"parameters": {"a": 1, "b": "x\\ny"}, "name": "add"}',
        JSON.replace("{", '{"id": "1", ', 1),
        f"<|python_tag|>\n{JSON}",
        JSON.replace("parameters", "arguments"),
        JSON.replace("{", '{"type": "function", ', 1),
        f'{{"type": "function", "function": {JSON}}}',
        f"[{JSON}]",
        JSON.replace("\\n", "\n"),
        f"<tool_call>{JSON}</tool_call>",
        "<tool_call>" + JSON.replace("\\n", "\n") + "</tool_call>",
        f"[TOOL_CALLS][{JSON.replace('parameters', 'arguments')}]",
        f"[TOOL_CALLS] [ {JSON} ]",
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x\\ny"}',
        '[TOOL_CALLS]add[CALL_ID]aB3dE6gH9[ARGS]{"a": 1, "b": "x\\ny"}',
        '[TOOL_CALLS]add{"a": 1, "b": "x\\ny"}',
        f"{FENCE}json\n{JSON}\n{FENCE}",
        f"So:\n{FENCE}\n{JSON}\n{FENCE}\nwait",
        f"{FENCE}json\n[{JSON}]\n{FENCE}",
        f"{FENCE}tool_call\n{JSON}",
        '<function=add>{"a": 1, "b": "x\\ny"}</function>',
    ],
)
def test_a_call_in_a_form_of_json(text: str) -> None:
    assert made(text) == [ADD]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<function=f>\n<parameter=code>\nif x:\n    y\n</parameter>\n</function>", {"code": "if x:\n    y"}),
        ("<tool_call>\n<function=f>\n<parameter=n>\n4\n</parameter>\n</function>\n</tool_call>", {"n": "4"}),
        (f"{FENCE}xml\n<function=f>\n<parameter=n>4</parameter>\n</function>\n{FENCE}", {"n": "4"}),
        ("<function=f><parameter=a></function></parameter></function>", {"a": "</function>"}),
        ("<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>4</arg_value>\n</tool_call>", {"n": "4"}),
        ("<tool_call>f</tool_call>", {}),
        ("<function=f>\n</function>", {}),
    ],
)
def test_a_call_in_a_form_of_text(text: str, arguments: dict[str, str]) -> None:
    assert made(text) == [("f", arguments)] and read(text).calls[0].is_text


def test_several_calls_of_one_form() -> None:
    for joint in ("; ", ";\n", "\n", "\n\nand\n"):
        assert made(f"{JSON}{joint}{JSON}") == [ADD, ADD]
    assert made('[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{"a": 1}') == [("f", {}), ("g", {"a": 1})]
    assert made("<function=f></function>\n<function=g></function>") == [("f", {}), ("g", {})]
    assert made(f"{FENCE}json\n{JSON}\n{FENCE}\nand\n{FENCE}json\n{JSON}\n{FENCE}") == [ADD, ADD]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "add", "parameters": {"a": 1}', "not valid JSON"),
        ('{"name": "add", "arguments": {a: 1}}', "not valid JSON"),
        (f'{FENCE}json\n{{"name": "add", "arguments": {{a: 1}}}}\n{FENCE}', "not valid JSON"),
        ('{"name": "add", "arguments": 4}', 'must be {"name"'),
        ("[TOOL_CALLS]", "[TOOL_CALLS] and a list"),
        ("[TOOL_CALLS] add(1)", "[TOOL_CALLS] and a list"),
        ("[TOOL_CALLS][]", "[TOOL_CALLS] and a list"),
        ('[TOOL_CALLS][{"name": "add", "arguments": {]', "not valid JSON"),
        ("[TOOL_CALLS]add[ARGS]{'a': 1}", "not valid JSON"),
        ("[TOOL_CALLS][4]", 'must be {"name"'),
        ("<function=f>", "</function>"),
        ("<function=f><parameter=a>1</function>", "</function>"),
        ("<function=f><parameter=a>1</parameter> so", "</function>"),
        ("<tool_call><function=f></tool_call>", "</function>"),
        ("<tool_call>f<arg_key>a</arg_key></tool_call>", "<arg_key>"),
        ('<function=f>{"a": }</function>', "not valid JSON"),
        ("<|tool_call_start|>[f(a=1)]<|tool_call_end|>", "must be written as <tool_call>"),
        ("<|tool_call>call:f{a:1}<tool_call|>", "must be written as <tool_call>"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function", "must be written as <tool_call>"),
        ("<|python_tag|>print(1)", "must be written as <tool_call>"),
        ('<function_calls>\n<invoke name="f">', "must be written as <tool_call>"),
        (f"I call {JSON}", "must be written as <tool_call>"),
        (f"as in `{JSON}`", "must be written as <tool_call>"),
        (f"{FENCE}javascript\n{JSON}\n{FENCE}", "must be written as <tool_call>"),
        (f"{FENCE}python\n{JSON}\n{FENCE}", "must be written as <tool_call>"),
        (f"{JSON[:8]} add </tool_call>", "must be written as <tool_call>"),
    ],
)
def test_a_malformed_call_gets_a_message(text: str, message: str) -> None:
    (call,) = read(text).calls
    assert call.error is not None and message in call.error and call.name == "" and "\n" not in call.error


@pytest.mark.parametrize(
    "text",
    [
        'answer: {"name": "Ann", "arguments": {}}',
        f"answer:\n{FENCE}json\n{JSON}\n{FENCE}",
        '{"name": "Ann", "age": 4}',
        f'{FENCE}json\n{{"name": "Ann", "age": 4}}\n{FENCE}\nanswer: 4',
        f"{FENCE}json\n[1, 2]\n{FENCE}\nanswer: 4",
        f"{FENCE}python\n{JSON}\n{FENCE}\nanswer: 4",
        f"as in `{JSON}`\nanswer: 4",
        f"{FENCE}javascript\n{JSON}\n{FENCE}\nanswer: 4",
        '{"arguments": {}, "age": 4}',
        f"<think>\n{JSON}\n</think>\nanswer: 4",
        "[1, 2]",
        '{"name": ',
        "a function f(x)",
        "<|python_tag|> and [ARGS]\nanswer: 4",
    ],
)
def test_what_is_no_call(text: str) -> None:
    assert not read(text).calls


def test_the_format_of_code_reads_none_of_them() -> None:
    for text in (JSON, f"[TOOL_CALLS][{JSON}]", "<function=f></function>"):
        assert parse_turn(text, call_format="code", max_calls=8) == ParsedTurn((), None)


def test_calls_of_a_turn_are_limited_in_each_form() -> None:
    for one in (f"{JSON}\n", "[TOOL_CALLS]add[ARGS]{}", "<function=f></function>", f"{JSON};"):
        *first, last = read(one * 100, max_calls=3).calls
        assert len(first) == 3 and last.fault is ToolStatus.OVER_QUOTA
    assert read(f"[TOOL_CALLS][{', '.join([JSON] * 100)}]", max_calls=3).calls[3].fault is ToolStatus.OVER_QUOTA


def test_values_that_came_as_text_get_the_types_of_the_tool() -> None:
    def count(n: int, exact: bool, words: list[str], name: str, share: float | None = None) -> str:
        """Counts.

        Args:
            n: A number.
            exact: Whether it is.
            words: Some.
            name: One.
            share: A part.
        """
        return repr((n, exact, words, name, share))

    values = {"n": "4", "exact": "True", "words": '["a"]', "name": "4", "share": "None"}
    text = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    toolbox = Toolbox([FunctionTool(count, timeout_s=60.0)])
    (result,) = asyncio.run(toolbox.execute(read(f"<function=count>\n{text}</function>").calls))
    assert result.text == "(4, True, ['a'], '4', None)"
    bad = text.replace("\n4\n", "\nfour\n", 1)
    (result,) = asyncio.run(toolbox.execute(read(f"<function=count>\n{bad}</function>").calls))
    assert result.status is ToolStatus.ERROR and "valid integer" in result.text
    # a value that came typed stays what it is
    (result,) = asyncio.run(toolbox.execute(read('{"name": "count", "arguments": {"n": "4"}}').calls))
    assert "valid integer" in result.text


class Adder(FunctionEpisode):
    def __init__(self) -> None:
        super().__init__("Add.", functions=[self.add])

    def add(self, by: int | None) -> str:
        """Adds.

        Args:
            by: How much.
        """
        return repr(by)

    def grade(self, trajectory: Trajectory) -> Grade:
        return Grade(1.0)


def test_an_episode_of_functions_gets_the_types_too() -> None:
    for value, shown in (("4", "4"), ("None", "None"), ("null", "None"), ("x", "add: argument 'by': ")):
        calls = read(f"<function=add><parameter=by>{value}</parameter></function>").calls
        (result,) = Adder().step(Turn([], [], "", calls=list(calls))).results
        assert result.text.startswith(shown)


READABLE = ("glm4moe", "llama3_1", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_vl")


@pytest.mark.parametrize("name", READABLE)
def test_the_form_that_a_template_writes_is_read(name: str) -> None:
    tokenizer = tokenizer_of(families()[name])
    arguments = {"city": "Rome", "days": 3}
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    begun = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    (found,) = read(whole[len(begun.partition("<think>")[0]) :]).calls
    assert found.name == "f" and found.error is None and list(found.arguments) == ["city", "days"]


OPENINGS = [
    "[TOOL_CALLS]",
    "<function=f>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "[ARGS]",
    '{"name": "f"',
    "{",
]
OPENINGS += [
    ', "arguments": {}}',
    "}",
    "[",
    "]",
    ";",
    "\n",
    "<|python_tag|>",
    FENCE,
    f"{FENCE}json\n",
    "<tool_call>",
    "f",
]
OPENINGS += ["</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>", "</think>", " ", '"']
TEXTS = st.lists(st.sampled_from(OPENINGS) | st.text(max_size=5), max_size=12).map("".join)


@settings(max_examples=300)
@example("{" * 5000)
@example('{"name": "f", "arguments": ' + "[" * 100_000)
@example('{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}")
@example("[TOOL_CALLS]" + "[" * 100_000)
@example('<function=f>{"a": ' + "9" * 5000 + "}</function>")
@given(text=TEXTS)
def test_no_text_raises_and_none_is_lost(text: str) -> None:
    turn = read(text)
    assert all(call.error is None or "\n" not in call.error for call in turn.calls)
    pieces = cut(text, tagged_calls=True)
    assert "".join(piece.text for piece in pieces) == text
    assert json.dumps([dict(call.arguments) for call in turn.calls]) is not None


def num_steps(text: str) -> int:
    """Lines of Python that are run to read `text`."""
    count = 0

    def trace(*_: object) -> object:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        read(text)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    "one",
    [
        "[TOOL_CALLS]",
        "[TOOL_CALLS][",
        "<function=f>",
        "<function=f><parameter=a>",
        "<function=f><parameter=a>1</parameter>",
        '{"name": "f", "arguments": {\n',
        '{"name":\n',
        '{"name": "f"}\n',
        '{"name": "f", "arguments": "',
        f"{JSON}; ",
        "<|python_tag|>",
        "<tool_call>f<arg_key>a</arg_key><arg_value>",
        f"{FENCE}json\n{{\n",
        '{"name": [\n',
        'x {"name":',
        '{"arguments": {\n',
        "<|tool_call|>\n[{",
        "[\n{",
        "</tool_call>",
        "<a:invoke ",
    ],
)
def test_the_work_grows_with_the_length_of_the_text(one: str) -> None:
    # a third of slack: blocks and events are read up to a number of times that does not grow
    assert num_steps(one * 4000) <= 2.7 * num_steps(one * 2000)
