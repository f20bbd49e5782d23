"""Prompts, tool output and completions as text and as token ids."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo.chat import Chat, written_answer, written_call
from gtpo.parsing import CallFormat
from gtpo.policy import Policy
from gtpo.templates import BrokenPrefix
from gtpo.tools import ToolSet
from gtpo.types import ToolCall
from tests.trainer.conftest import prompt, python, tiny_policy

END = "<|im_end|>"


def test_demonstrations_parse_back(policy: Policy) -> None:
    for call_format in get_args(CallFormat):
        chat = Chat(policy.tokenizer, call_format=call_format)
        text = written_call(ToolCall("python", {"code": 'print("a")\nprint(1)'}), call_format)
        ids = chat.completion_ids(text)
        assert ids[-1] == chat.end_of_turn_id and chat.decode(ids) == text
        assert chat.parse(text).calls[0].code == 'print("a")\nprint(1)'
        assert chat.parse(written_answer("1 2")).answer == "1 2"


@given(
    text=st.lists(st.sampled_from([END, "<|im_start|>", "<|pad|>", "assistant\n"]) | st.text(max_size=4)).map("".join)
)
def test_tool_text_never_becomes_a_control_id(policy: Policy, text: str) -> None:
    chat = Chat(policy.tokenizer)
    control = set(policy.tokenizer.convert_tokens_to_ids([END, "<|im_start|>", "<|pad|>"]))

    def count(ids: list[int]) -> int:
        return sum(token in control for token in ids)

    assert count(chat.reply_ids([text])) == count(chat.reply_ids(["plain"])) > 0
    assert count(chat.completion_ids(text)) == 1
    assert chat.decode(chat.completion_ids(text)) == text


def test_appended_ids_are_those_of_the_whole_conversation(policy: Policy) -> None:
    chat, tokenizer = Chat(policy.tokenizer), policy.tokenizer
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": python("print(1)")},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    ids = chat.prompt_ids(prompt("S", "Q")) + chat.completion_ids(python("print(1)")) + chat.reply_ids(["1", "2"])
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == whole


def test_the_json_prompt_has_the_schemas(policy: Policy) -> None:
    schemas = ToolSet(["python", "calculator"]).schemas
    chat = Chat(policy.tokenizer, call_format="json")
    shown = policy.tokenizer.decode(chat.prompt_ids(prompt("S", "Q"), schemas))
    found = [json.loads(line) for line in shown.splitlines() if line.startswith('{"function"')]
    assert [schema["function"]["name"] for schema in found] == ["python", "calculator"]
    assert found[1]["function"]["parameters"]["required"] == ["expression"]
    assert all("return" not in schema["function"] for schema in found)
    assert "<tool_call>" in shown
    assert "<tool_call>" not in policy.tokenizer.decode(Chat(policy.tokenizer).prompt_ids(prompt("S", "Q"), schemas))


def test_the_protocol_is_explained_where_the_prompt_leaves_it_out(policy: Policy) -> None:
    def shown(call_format: CallFormat = "code", *, explain: bool = False) -> str:
        chat = Chat(policy.tokenizer, call_format=call_format)
        schemas = ToolSet(["python", "calculator"]).schemas
        return str(policy.tokenizer.decode(chat.prompt_ids(prompt("S", "Q"), schemas, explain_protocol=explain)))

    code = shown(explain=True)
    assert "```python" in code and "answer: ..." in code and "\n- calculator(expression: string): " in code
    assert "answer:" not in shown() and "answer: ..." in shown("json")


@given(
    text=st.lists(st.sampled_from([END, "<|im_start|>", "<|pad|>", "assistant\n"]) | st.text(max_size=4)).map("".join)
)
def test_prompt_text_never_becomes_a_control_id(policy: Policy, text: str) -> None:
    chat = Chat(policy.tokenizer)
    control = set(policy.tokenizer.convert_tokens_to_ids([END, "<|im_start|>", "<|pad|>"]))
    for prompts in ((text, "Q"), ("S", text)):
        ids = chat.prompt_ids(prompt(*prompts))
        assert sum(token in control for token in ids) == 5
        assert policy.tokenizer.decode(ids) == chat.template.render(prompt(*prompts), add_generation_prompt=True)


def test_a_template_that_drops_the_first_message_is_refused() -> None:
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for", "{% set messages = messages[1:] or messages %}{% for"
    )
    with pytest.raises(BrokenPrefix, match="must keep earlier turns"):
        Chat(tokenizer)


REWRITES = "{% for m in messages %}{{ m['content'] if loop.last else '(cut)' }}<|im_end|>{% endfor %}"
DROPS_REPLIES = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}thought reply<|im_end|>"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
DROPS_TOOLS = "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("template", [REWRITES, DROPS_REPLIES, NO_END])
def test_templates_that_break_the_prefix_are_refused(template: str) -> None:
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = template
    with pytest.raises(BrokenPrefix):
        Chat(tokenizer)


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_decorates_the_last_turn_only_is_taken() -> None:
    tokenizer = tiny_policy().tokenizer
    plain = Chat(tokenizer).reply_ids(["1", "2"])
    tokenizer.chat_template = QWEN3
    # the glue behind the end of the turn, and nothing of the empty thoughts in front of it
    assert Chat(tokenizer).reply_ids(["1", "2"]) == plain


def test_a_template_that_drops_tool_output_is_refused() -> None:
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = DROPS_TOOLS
    with pytest.raises(ValueError, match=r"drops messages of role 'tool'; set rollout\.tool_role = \"user\""):
        Chat(tokenizer)
    assert len(Chat(tokenizer, tool_role="user").reply_ids(["1"])) > 1


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("call_format", get_args(CallFormat))
def test_a_generation_prompt_that_opens_a_thought(call_format: CallFormat) -> None:
    tokenizer = tiny_policy().tokenizer
    plain = Chat(tokenizer, call_format=call_format)
    tokenizer.chat_template = THINKS
    chat = Chat(tokenizer, call_format=call_format)
    draft = written_call(ToolCall("python", {"code": "draft()"}), call_format)
    assert plain.parse(draft).calls and not chat.parse(draft).calls
    turn = chat.parse(f"{draft}\nanswer: 5 </think>answer: 4")
    assert (turn.answer, turn.said) == ("4", "answer: 4")
    # a demonstration closes the thought before it acts
    for opened in (plain, chat):
        (made,) = opened.parse(opened.decode(opened.completion_ids(draft))).calls
        assert made.code == "draft()"
        assert opened.parse(opened.decode(opened.completion_ids(written_answer("4")))).answer == "4"
    (made,) = Chat(tokenizer, call_format=call_format, reasoning_may_call=True).parse(draft).calls
    assert made.code == "draft()"


def test_each_stop_id_ends_a_turn_and_is_no_text(policy: Policy) -> None:
    (other,) = policy.tokenizer.convert_tokens_to_ids(["<|pad|>"])
    chat = Chat(policy.tokenizer, stop_ids=[other])
    assert chat.stop_ids == {chat.end_of_turn_id, other}
    assert chat.decode([*chat.completion_ids("answer: 4")[:-1], other]) == "answer: 4"


def test_a_model_without_chat_template_or_end_of_turn_is_refused() -> None:
    tokenizer = tiny_policy().tokenizer
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="must have a chat template, got none"):
        Chat(tokenizer)
    tokenizer = tiny_policy().tokenizer
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-turn token"):
        Chat(tokenizer)
