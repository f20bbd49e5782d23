"""What is read out of a completion: calls, answers, programs; reasoning is kept apart."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo.parsing import ParsedTurn, bare_answer, last_program, opens_thought, parse_turn
from gtpo.parsing.pieces import cut
from gtpo.types import ToolStatus
from tests.trainer.conftest import python

BAD_BLOCK = "a code block must open with ```python and close with ```"
FENCE = "`" * 3


def code(text: str, **options: object) -> ParsedTurn:
    return parse_turn(text, call_format="code", **({"max_calls": 8} | options))  # type: ignore[arg-type]


def as_json(text: str, **options: object) -> ParsedTurn:
    return parse_turn(text, call_format="json", **({"max_calls": 8} | options))  # type: ignore[arg-type]


def call(body: object) -> str:
    return f"<tool_call>{body if isinstance(body, str) else json.dumps(body)}</tool_call>"


def codes(turn: ParsedTurn) -> list[str]:
    assert all(made.error is None and made.name == "python" for made in turn.calls) and turn.answer is None
    return [made.code for made in turn.calls]


def test_code_calls() -> None:
    turn = code(f"First.\n{python('x = 1')}\nthen\n```py\nprint(x)\n\nprint(2)\n```")
    assert codes(turn) == ["x = 1", "print(x)\n\nprint(2)"]


@pytest.mark.parametrize(
    "text",
    [
        "```Python\nprint(1)\r\n```",
        "```python3 \nprint(1)\n```",
        "```PY\nprint(1)\n```",
        "```python\r\nprint(1)\r\n```\r\n",
        "~~~python\nprint(1)\n~~~",
        "````python\nprint(1)\n````",
        "````python\nprint(1)\n`````",
        "```python title=a.py\nprint(1)\n```",
        "```{.python .wide}\nprint(1)\n```",
        "```python:main.py\nprint(1)\n```",
        "``` python\nprint(1)\n``` ",
        "First: ```python\nprint(1)\n```",
        "```python\nprint(1)```",
        "```python\nprint(1)\n   ```",
        "  ```python\n  print(1)\n  ```",
        "1. Look:\n\n    ```python\n    print(1)\n    ```\n2. Then",
        "- Look:\n\t```python\n\tprint(1)\n\t```",
        "- ```python\n  print(1)\n  ```",
        "12) ```python\n    print(1)\n    ```",
        "so</think>```python\nprint(1)\n```",
    ],
)
def test_fences_as_models_write_them(text: str) -> None:
    assert codes(code(text)) == ["print(1)"]
    assert last_program(text) in ("print(1)\n", "print(1)\r\n", "print(1)")


@pytest.mark.parametrize(
    "program",
    [
        f's = "{FENCE}python"\nprint(s)',
        f's = """\n{FENCE}\nf()\n{FENCE}\n"""\nprint(s)',
        f"s = '''\n{FENCE}python\nf()\n{FENCE}\n'''\nprint(s)",
        f'def f():\n    """Do.\n\n    {FENCE}\n    f()\n    {FENCE}\n    """\nf()',
        f'r"""\\\n{FENCE}\n\\"""\n{FENCE}\n"""',
        f"# it's \"\"\" no string\nprint('{FENCE}')",
        f"x = 'it\\'s' + \"'''\"\ny = '''\n{FENCE}\n'''",
        "print('~~~')\n# ~~~ no end",
        'print("<think>")\nprint("</think>")',
        "s = '''\n<think>\n'''",
    ],
)
def test_a_program_may_hold_what_opens_and_closes_blocks(program: str) -> None:
    for text in (python(program), f"So:\n\n~~~py\n{program}\n~~~\nIt prints.", f"> a\n\n{python(program)}\n"):
        assert codes(code(text)) == [program]
    assert codes(as_json(call({"name": "python", "arguments": {"code": program}}))) == [program]
    assert last_program(python(program)) == program + "\n"


def test_the_indent_of_a_fence_is_that_of_its_lines() -> None:
    text = "1. So\n   ```python\n   if x:\n       f()\n  g()\n\n   ```"
    assert codes(code(text)) == ["if x:\n    f()\ng()\n"[:-1]]


def test_a_string_that_never_ends_takes_no_further_block() -> None:
    broken, whole = 's = """\nprint(s)', "print(2)"
    assert codes(code(f"{python(broken)}\nthen\n{python(whole)}")) == [broken, whole]


def test_a_quoted_block_is_no_call() -> None:
    for quote in (
        f"{FENCE}text\n4\n{FENCE}",
        f"~~~output\n{python('x')}\n~~~",
        f"{FENCE}{FENCE}md\n{python('x')}\n{FENCE * 2}",
    ):
        assert code(f"It printed\n{quote}\nanswer: 4") == ParsedTurn((), "4")
        assert codes(code(f"{quote}\n{python('y')}")) == ["y"]
    # as CommonMark has it, a closing fence is indented by three spaces at most
    assert code(f"{FENCE}text\n    {FENCE}\nanswer: 5\n{FENCE}\nanswer: 4").answer == "4"


@pytest.mark.parametrize(
    "text",
    [
        "```\nprint(1)\n```",
        "```python\nprint(1)",
        "```bash\nls\n```",
        "answer: 4\n```python\nprint(1)",
        "```python\nprint('```')",
        "~~~python\nprint(1)\n```",
        "````python\nprint(1)\n```",
        "see ``` there",
        "```\nprint('answer:', x)\n```",
        "> ```python\n> print(1)\n> ```",
        "```text\n4",
    ],
)
def test_malformed_code(text: str) -> None:
    (made,) = code(text).calls
    assert (made.error, made.code, made.fault) == (BAD_BLOCK, "", ToolStatus.MALFORMED)


def test_a_block_of_another_language_beside_a_call_is_a_fault_and_beside_an_answer_a_quote() -> None:
    block = f"{FENCE}bash\nls\n{FENCE}"
    assert [made.error for made in code(f"{block}\n{python('x')}").calls] == [None, BAD_BLOCK]
    assert code(f"{block}\nanswer: 4") == code(f"answer: 4\n{FENCE}\n5\n{FENCE}") == ParsedTurn((), "4")


def test_json_calls() -> None:
    as_object = {"name": "calculator", "arguments": {"expression": "1 + 1"}}
    as_text = {"name": "python", "arguments": '{"code": "print(1)"}'}
    first, second = as_json(f"{call(as_object)}\n{call(as_text)}").calls
    assert (first.name, first.arguments, first.error) == ("calculator", {"expression": "1 + 1"}, None)
    assert (second.name, second.code, second.error) == ("python", "print(1)", None)


@pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "```\n{}\n```\nso", "1. `{}`", "<think>no</think>{}"])
def test_frames_around_json_calls(frame: str) -> None:
    texts = ["</tool_call>", "<tool_call>", "<think>", "```", 'it\'s "x" {']
    for text in texts:
        (made,) = as_json(frame.format(call({"name": "f", "arguments": {"text": text}}))).calls
        assert (made.name, made.arguments, made.error) == ("f", {"text": text}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (call("{"), "not valid JSON"),
        (call("[1]"), 'must be {"name": a string'),
        (call({"name": "python"}), 'must have the keys "name" and "arguments"'),
        (call({"name": 3, "arguments": {}}), 'must be {"name": a string'),
        (call({"name": "python", "arguments": [1]}), 'must be {"name": a string'),
        (call({"name": "python", "arguments": "nothing"}), "not valid JSON"),
        ('<tool_call>{"name": "python", "arguments": {}}', "closed with </tool_call>"),
        (call('{"name": "python", "arguments": {"code": ' + "9" * 5000 + "}}"), "not JSON that can be read"),
        (call("[" * 100_000), "not JSON that can be read"),
        (call('{"name": "f", "arguments": {}} {}'), "not valid JSON: Extra data"),
    ],
)
def test_malformed_json(text: str, message: str) -> None:
    (made,) = as_json(text).calls
    assert made.error is not None and message in made.error and made.name == ""


THOUGHTS = [
    "<think>{}</think>\n",
    "<think>\n{}\n</think>\n\n",
    "<Thinking>{}</Thinking>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "Well. <think>{}</think> So: ",
    # nobody opened it, or the prompt did
    "{}\n</think>\n\n",
    "<think>one</think> and <think>{}</think>",
]
DRAFTS = [
    python("draft()"),
    "```python\ndraft()",
    call({"name": "draft", "arguments": {}}),
    "<tool_call>{",
    "```\nx\n```",
    "answer: 7? No.",
    "`<think>`",
]


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_draft_in_a_thought_is_neither_a_call_nor_the_answer(thought: str, draft: str) -> None:
    unopened = thought.startswith("{}")
    if unopened and draft in ("```python\ndraft()", "<tool_call>{"):
        # an open block goes on, unless it is known that this is a thought
        assert code(thought.format(draft) + "answer: 4", is_thinking=True).answer == "4"
        return
    before = thought.format(draft)
    for read in (code, as_json):
        assert read(f"{before}answer: 4") == ParsedTurn((), "4")
        assert read(before.replace("So: ", "")).answer in (None, "7? No.") and (unopened or not read(before).calls)
    assert codes(code(f"{before}\n{python('real()')}")) == ["real()"]
    assert codes(as_json(before + call({"name": "python", "arguments": {"code": "real()"}}))) == ["real()"]
    assert "draft" not in code(before + "x").said and last_program(before + "x") is None
    assert last_program(f"{before}\n{python('real()')}") == "real()\n"


def test_a_thought_that_does_not_end_says_nothing() -> None:
    for text in (f"<think>{python('x')}\nanswer: 4", "\n <think>answer: 4", "so\n<think>\nanswer: 4"):
        assert code(text) == as_json(text) == ParsedTurn((), None)
    assert code(f"answer: 4\n{python('x')}", is_thinking=True) == ParsedTurn((), None)
    assert code("so? </think>answer: 4", is_thinking=True).answer == "4"
    # a word of the prose is no thought
    assert code("The tag <think> is one. answer: 4").answer == code("`<think>`: answer: 4").answer == "4"


def test_calls_of_a_thought_where_they_are_wanted() -> None:
    text = f"<think>{python('first()')}\nanswer: 5\n{FENCE}bash\nls\n{FENCE}</think>"
    assert codes(code(f"{text}{python('second()')}", reasoning_may_call=True)) == ["first()", "second()"]
    assert codes(code(text, reasoning_may_call=True)) == ["first()"]
    assert code("<think>answer: 5</think>answer: 4", reasoning_may_call=True).answer == "4"
    drafted = call({"name": "python", "arguments": {"code": "first()"}})
    assert codes(as_json(f"{drafted} so", is_thinking=True, reasoning_may_call=True)) == ["first()"]


def test_whether_a_prompt_opens_a_thought() -> None:
    assert opens_thought("assistant\n<think>\n") and opens_thought("[THINK]") and opens_thought("x <think>")
    assert not opens_thought("<think>\n\n</think>\n\n") and not opens_thought("<think> assistant")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("answer: 42", "42"),
        ("So Answer:  3 boxes \nDone.", "3 boxes"),
        ("answer: 1\nno, answer: 2", "2"),
        ("answer:", None),
        ("answer: 1\nanswer:", "1"),
        ("answer: \n4", "4"),
        ("42", None),
        ("answers: 4", None),
        ("answer: `x = 1`", "x = 1"),
        ("answer: 2**3", "2**3"),
        ("answer: **", None),
        ("answer: a*", "a*"),
        ("answer: *.py", "*.py"),
        ("answer: [0, 1)", "[0, 1)"),
        ("answer: f(x)", "f(x)"),
        ("answer: `a` and `b`", "`a` and `b`"),
        ('answer: "a" or "b"', '"a" or "b"'),
        ("answer: U.S.", "U.S."),
        ("answer: $5", "$5"),
        ("answer: 5'", "5'"),
        (r"answer: \frac{1}{2}", r"\frac{1}{2}"),
        (r"answer: $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("answer: **New York**.", "New York"),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert code(text).answer == as_json(text).answer == answer


@pytest.mark.parametrize(
    "text",
    [
        *("answer: **4**", "**Answer:** 4", "**answer: 4**", "**Answer**: 4", "**Answer:** **4**", "answer: **4**."),
        *("***answer: 4***", "answer: *4*", "answer: `4`.", r"Answer: \boxed{4}", "answer: 4 </think>", "Answer：4"),
        *(
            "answer : 4",
            'answer: "4"',
            "That is it. So answer: 4",
            "answer: 4\n</think>\n",
            "answer: 4</think></think>",
        ),
        *("# Answer: 4", "## Answer\n4", "**Final Answer**\n\n4", "**Answer:**\n\n4", "__Answer__: 4", "*Answer: 4*"),
        *("**So the answer: 4**", "answer: **`4`**", 'answer: **"4"**.', "answer: “4”", "answer: '4'", "answer: 4."),
        *(
            "`answer: 4`",
            '"answer: 4"',
            '{"answer": "4"}',
            '{"answer": 4}',
            "(answer: 4)",
            "> answer: 4",
            "- answer: 4",
        ),
        *(r"\textbf{Answer:} 4", r"\textbf{Answer: 4}", "answer: $4$", "answer: $$4$$", r"answer: \(4\)"),
        *("answer:\n$$\n4\n$$", "answer:\n\\[\n4\n\\]", r"answer: \text{4}", r"answer: $\boxed{\text{4}}$"),
        *("<b>Answer:</b> 4", "<b>Answer</b>: <b>4</b>", "<answer>4</answer>", "answer: <answer>\n4\n</answer>"),
        *("answer: 4<|im_end|>", "answer: 4。", "answer: \u200b4", "answer:\xa04", "answer: 4 ```", "Answer:4"),
        *(
            "answer:\n```\n4\n```",
            "answer:\n```text\n4\n```",
            "```\nanswer: 4\n```",
            "answer: 4\n```text\nanswer: 5\n```",
        ),
        *("ANSWER﹕4", "answer: ```4```", "answer: 4**", "answer: **4"),
    ],
)
def test_what_models_put_around_an_answer(text: str) -> None:
    assert code(text).answer == "4"
    assert bare_answer(code(text).answer or "") == "4"


def test_a_program_is_the_last_block_of_python() -> None:
    program, sample = python("print(1)"), f"{FENCE}text\n1\n{FENCE}"
    for text in (
        f"{program}\nIt prints:\n{sample}",
        f"{sample}\n{program}",
        f"{FENCE}\nold\n{FENCE}\n{program}\n{FENCE}\n1\n{FENCE}",
    ):
        assert last_program(text) == "print(1)\n"
    assert last_program(f"{FENCE}\nprint(2)\n{FENCE}\n{sample}") == "print(2)\n"
    assert last_program(sample) is None and last_program("```python\nprint(1)") is None
    assert last_program(f"{program}\n<think>{python('draft()')}</think>") == "print(1)\n"


@pytest.mark.parametrize("num", [3, 4, 14_000])
def test_a_turn_makes_a_bounded_number_of_calls(num: int) -> None:
    blocks = f"{python('x')}\n" * num
    tags = call({"name": "python", "arguments": {"code": "x"}}) * num
    for turn in (code(blocks, max_calls=3), as_json(tags, max_calls=3)):
        assert [made.code for made in turn.calls[:3]] == ["x"] * 3
        if num == 3:
            assert len(turn.calls) == 3
        else:
            (rest,) = turn.calls[3:]
            assert rest.error == "a turn may make 3 calls; those after the first 3 were not made"
            assert rest.fault is ToolStatus.OVER_QUOTA


PIECES = st.sampled_from(
    [
        *("```", "```python\n", "~~~", "~~~py\n", "<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", "["),
        *(
            "]",
            '"',
            "'",
            '"""',
            "'''",
            "\\",
            ":",
            "answer:",
            "\n",
            " ",
            '"name"',
            "NaN",
            "**",
            "`",
            "\\boxed{",
            "$",
            "<|x|>",
        ),
    ]
)
TEXTS = st.one_of(st.text(), st.lists(PIECES | st.text(max_size=5)).map("".join))


@given(text=TEXTS, is_thinking=st.booleans(), reasoning_may_call=st.booleans())
@settings(max_examples=200)
def test_parse_never_raises(text: str, is_thinking: bool, reasoning_may_call: bool) -> None:
    for read in (code, as_json):
        turn = read(text, is_thinking=is_thinking, reasoning_may_call=reasoning_may_call, max_calls=2)
        assert turn.answer is None or (turn.answer and not turn.calls)
        assert all(made.error is None or (made.name, made.arguments) == ("", {}) for made in turn.calls)
        assert len(turn.calls) <= 4
    for tagged in (True, False):
        assert "".join(piece.text for piece in cut(text, is_thinking=is_thinking, tagged_calls=tagged)) == text
    last_program(text)


LEAVES = st.none() | st.integers() | st.text()


@given(arguments=st.recursive(LEAVES, lambda inner: st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_arguments_come_through_or_are_refused(arguments: object) -> None:
    (made,) = as_json(call({"name": "f", "arguments": arguments})).calls
    if isinstance(arguments, dict):
        assert made.arguments == arguments and made.error is None


REPEATED = [
    *("<tool_call>", "<tool_call>\n", '<tool_call>"', '<tool_call>{"a":', "<tool_call>[", "<tool_call></tool_call>"),
    *('<tool_call>"</tool_call>', '<tool_call>["</tool_call>","', "```text\n<tool_call>\n"),
    *("```", "```\n", "```python\n", "```python\n\\'''\n```\n", "```python\n'''\n```\n", "```py\nx\n```\n"),
    *("~~~\n```\n", "```python", "x```python\n", "`", "~", "`` ", "- ", "-\t", "1. ", "* ", "    ", "\t"),
    *("<think>", "</think>", "<think>\n", "x</think>\n", "x<think>y</think>", "</think> ", "<think></think>"),
    *("answer:", "answer:\n", "answer: ", "answer **", "answer: **\n", "**answer: x", "answer: \\boxed{", "\\boxed{"),
    *("*", "_", "a_", '"', "'", "“", "(", ")", "{", "}", "$", "answer:`", "answer: </b>", "# answer ", "## ", "<|"),
    *("\\", "\\'", "#", "'x", "\r", "\n", " \n", "\xa0", "<answer>", "\u200b", "◁think▷"),
]


def num_calls(text: str) -> int:
    """Calls that Python makes for a text. Time inside one of them shows in the test below, as one that does not end."""
    count = 0

    def look(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(look)
    try:
        for read in (code, as_json):
            read(text, reasoning_may_call=True)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("head", ["", "```python\n"])
@pytest.mark.parametrize("piece", REPEATED)
def test_steps_grow_with_the_length_of_a_text(piece: str, head: str) -> None:
    small, large = (num_calls(head + piece * num) for num in (50, 200))
    # four times the text, and no more than that for what is looked up once
    assert large <= 5 * small + 200


@pytest.mark.parametrize("head", ["", "answer: "])
@pytest.mark.parametrize("piece", REPEATED)
def test_a_text_as_long_as_a_completion_can_be_is_read(piece: str, head: str) -> None:
    text = head + piece * (50_000 // len(piece))
    for read in (code, as_json):
        read(text)
