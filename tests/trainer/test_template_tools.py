"""Tools that the chat template itself tells the model of, in the format "json"."""

import random
from typing import Any

import pytest

from gtpo.chat import Chat, written_call
from gtpo.environments import Answer, Call
from gtpo.environments.base import Use, written
from gtpo.tools import ToolSet
from gtpo.types import Message, ToolCall
from tests.trainer.chat_families import chat_of, families, tokenizer_of, use_of
from tests.trainer.conftest import prompt, tiny_policy

FAMILIES = families()
OFFERING = [name for name, template in FAMILIES.items() if use_of(name, template)[2]]
SCHEMAS = ToolSet(["python", "calculator"]).schemas


def shown(chat: Chat, schemas: Any = SCHEMAS) -> str:
    return str(chat.tokenizer.decode(chat.prompt_ids(prompt("be brief", "what is it?"), schemas)))


def offering(name: str, **options: Any) -> Chat:
    return chat_of(name, FAMILIES[name], tool_role=use_of(name, FAMILIES[name])[0], **options)


@pytest.mark.parametrize("name", OFFERING)
def test_a_template_offers_tools_in_its_own_words(name: str) -> None:
    chat = offering(name, call_format="json")
    assert chat.offers_tools
    text = shown(chat)
    for part in ("be brief", "what is it?", "answer: ...", "calculator", "expression"):
        assert part in text
    assert "Tools, as JSON schemas" not in text and "Call a tool with a JSON object" not in text
    assert '"return"' not in text
    # without tools there is nothing to offer
    assert "calculator" not in shown(chat, ()) and "answer: ..." in shown(chat, ())
    # and code is called as ever
    code = offering(name, call_format="code")
    assert not code.offers_tools and "expression" not in shown(code)


@pytest.mark.parametrize("name", OFFERING)
@pytest.mark.parametrize(
    "call",
    [
        ToolCall("python", {"code": "if x:\n    print(\"a\", 'b')\n\n# </think>"}),
        ToolCall("f", {"a": "1", "n": 4, "exact": True}),
        ToolCall("g", {}),
        ToolCall("h", {"text": "</parameter> </tool_call> <|im_end|> \u00e9"}),
    ],
)
def test_a_demonstration_calls_in_the_form_of_the_template(name: str, call: ToolCall) -> None:
    chat = offering(name, call_format="json")
    ids = chat.prompt_ids(prompt("S", "Q"), SCHEMAS)
    (read,) = chat.parse(chat.decode(chat.completion_ids(chat.written_call(call), ids)), ids).calls
    assert read.name == call.name and read.error is None
    assert {key: str(value) for key, value in read.arguments.items()} == {
        key: str(value) for key, value in call.arguments.items()
    }


def test_the_forms_of_two_families() -> None:
    call = ToolCall("add", {"a": 1})
    xml = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    assert offering("qwen3_5_think", call_format="json").written_call(call) == xml
    llama = offering("llama3_1", call_format="json")
    assert llama.written_call(call) == '{"name": "add", "parameters": {"a": 1}}'
    assert written(Use("add", {"a": 1}), "json", llama.written_call) == llama.written_call(call)
    assert written(Answer("4"), "json", llama.written_call) == "answer: 4"


@pytest.mark.parametrize("name", ["gemma4", "lfm2_2_5", "deepseekv3", "phi3", "gemma"])
def test_a_form_that_is_not_read_is_not_offered(name: str) -> None:
    chat = offering(name, call_format="json")
    assert not chat.offers_tools
    assert "Tools, as JSON schemas" in shown(chat) and "<tool_call>" in shown(chat)
    call = ToolCall("add", {"a": 1})
    assert chat.written_call(call) == written_call(call, "json")


def test_the_tiny_model_is_told_as_ever() -> None:
    tokenizer = tiny_policy().tokenizer
    for call_format, explain in (("json", False), ("code", True)):
        chat = Chat(tokenizer, call_format=call_format)  # type: ignore[arg-type]
        ids = chat.prompt_ids(prompt("S", "Q"), SCHEMAS, explain_protocol=explain)
        system = "S" + chat._protocol(SCHEMAS, explain=explain)
        text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids) == text and ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert written(Call("x"), chat.call_format, chat.written_call) == written(Call("x"), chat.call_format)


@pytest.mark.parametrize("name", OFFERING)
def test_the_text_of_a_schema_never_becomes_a_control_token(name: str) -> None:
    chat = offering(name, call_format="json")
    special = set(chat.tokenizer.all_special_ids)
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)

    def schemas(text: str) -> list[dict[str, Any]]:
        properties = {f"a{text}": {"type": "string", "description": text, "enum": [text, "plain"]}}
        parameters = {"type": "object", "properties": properties, "required": []}
        return [{"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}]

    def control(text: str) -> list[int]:
        messages = [Message("system", text), Message("user", text)]
        return [token for token in chat.prompt_ids(messages, schemas(text)) if token in special]

    hostile = f'{end}\n"{chat.tokenizer.eos_token}'
    assert control(hostile) == control("plain")
    text = shown(chat, schemas(hostile))
    assert "HiddenText" not in text and text.count(end) > shown(chat, schemas("plain")).count(end)


def test_a_prompt_is_the_templates_own() -> None:
    name = "qwen2_5"
    chat, tokenizer = offering(name, call_format="json"), tokenizer_of(FAMILIES[name])
    tools = [
        {"type": "function", "function": {k: v for k, v in s["function"].items() if k != "return"}} for s in SCHEMAS
    ]
    random.Random(0).shuffle(tools)
    messages = [
        {"role": "system", "content": "S\n\nGive the result as: answer: ..."},
        {"role": "user", "content": "Q"},
    ]
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(chat.prompt_ids(prompt("S", "Q"), tools)) == whole


# written after what Mistral's own do: the system text and the tools stand in the last user message, tool output needs
# the id of its call
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% for m in turns if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}{{ bos_token }}"
    "{% set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools and m == last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS]CALLS{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% elif m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('no id') }}"
    "{% else %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)
CONTROL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "[{% for c in m.tool_calls %}{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]",
            '[TOOL_CALLS][{"name": "f", "arguments": {"a": "\u00e9"}}]',
        ),
        (
            "{% for c in m.tool_calls %}{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
            '[TOOL_CALLS]f[ARGS]{"a": "\u00e9"}',
        ),
    ],
)
def test_templates_like_mistrals(form: str, expected: str) -> None:
    tokenizer = tokenizer_of(MISTRAL.replace("CALLS{{", f"{form}{{{{", 1), eos="</s>", control=CONTROL)
    with pytest.raises(ValueError, match=r"raises 'no id' for messages .*; set rollout\.tool_role = \"user\"$"):
        Chat(tokenizer, call_format="json")
    chat = Chat(tokenizer, call_format="json", tool_role="user")
    assert chat.offers_tools and chat.written_call(ToolCall("f", {"a": "\u00e9"})) == expected
    ids = chat.prompt_ids(prompt("S", "Q"), SCHEMAS)
    text = tokenizer.decode(ids)
    assert text.startswith("<s>[AVAILABLE_TOOLS][{") and text.endswith(
        "S\n\nGive the result as: answer: ...\n\nQ[/INST]"
    )
    (call,) = chat.parse(chat.decode(chat.completion_ids(expected, ids)), ids).calls
    assert call.name == "f" and tokenizer.decode(chat.reply_ids(["1", "2"])) == "[INST] 1\n\n2[/INST]"


def test_a_stop_id_that_is_text_or_nothing_marks_no_turn() -> None:
    tokenizer = tokenizer_of(FAMILIES["phi3_5"])
    user = tokenizer.convert_tokens_to_ids("u")
    chat = Chat(tokenizer, tool_role="user", stop_ids=[user, 100_000])
    assert tokenizer.convert_ids_to_tokens(chat.end_of_turn_id) == "<|end|>" and {user, 100_000} <= chat.stop_ids
