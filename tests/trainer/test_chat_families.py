"""Chat templates of model families: each trains, or is refused in one line, and the page of models says which."""

import datetime
import json
from typing import Any, Literal

import pytest

from gtpo.chat import Chat, written_answer, written_call
from gtpo.templates import TemplateFault
from gtpo.types import Message, ToolCall
from tests.trainer.chat_families import EOS, PAGE, chat_of, families, tokenizer_of, use_of, written
from tests.trainer.conftest import prompt

FAMILIES = families()


def test_the_page_of_models_is_what_the_templates_do() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(FAMILIES) == 72 and page == written(page), "run python -m tests.trainer.chat_families"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_or_is_refused_in_one_line(name: str) -> None:
    role, why, _ = use_of(name, FAMILIES[name])
    assert "\n" not in why and "Traceback" not in why
    if role == "refused":
        assert why.startswith("the chat template") and len(why) < 900
        return
    chat = chat_of(name, FAMILIES[name], tool_role=role, call_format="json")
    text, outputs = written_call(ToolCall("python", {"code": "print(1)"}), "json"), ["out-1", "out-2"]
    ids = chat.prompt_ids(prompt("be brief", "what is it?"))
    for behind in (ids, chat.reply_ids(outputs)):
        assert chat.parse(chat.decode(chat.completion_ids(text, behind)), behind).calls[0].code == "print(1)"
        written_ids = chat.completion_ids(written_answer("4"), behind)
        assert written_ids[-1] == chat.end_of_turn_id and chat.end_of_turn_id in chat.stop_ids
        assert chat.parse(chat.decode(written_ids), behind).answer == "4"
    shown = chat.tokenizer.decode([*ids, *chat.completion_ids(text, ids), *chat.reply_ids(outputs)])
    for part in ("be brief", "what is it?", text, *outputs):
        assert shown.count(part) == 1
    # text stays text: no more control tokens than with harmless words
    control, special = why + EOS, set(chat.tokenizer.all_special_ids)
    for hostile, plain in (
        (chat.prompt_ids(prompt(control, control)), chat.prompt_ids(prompt("a", "b"))),
        (chat.reply_ids([control, control]), chat.reply_ids(["a", "b"])),
        (chat.reply_ids([control], [Message("user", control)]), chat.reply_ids(["a"], [Message("user", "b")])),
    ):
        assert [token for token in hostile if token in special] == [token for token in plain if token in special]


def conversation(chat: Chat, *contents: str) -> str:
    """What the template makes of user and assistant taking turns."""
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)
    ]
    return str(chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# written after what Mistral's own do: strict turns, no role for tools without their ids, arguments in the last turn
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "eos", "role"),
    [(FAMILIES["gemma"], EOS, "system"), (FAMILIES["gemma3"], "<end_of_turn>", "user"), (STRICT, "</s>", "user")],
)
def test_a_strict_template_joins_what_it_does_not_take(
    template: str, eos: str, role: Literal["system", "user"]
) -> None:
    tokenizer = tokenizer_of(template, eos=eos)
    with pytest.raises(TemplateFault, match=r'roles user, assistant, tool; set rollout\.tool_role = "user"$'):
        Chat(tokenizer)
    chat = Chat(tokenizer, tool_role="user")
    ids = chat.prompt_ids([Message("system", "S"), Message("user", "Q"), Message("user", "R")])
    assert tokenizer.decode(ids) == conversation(chat, "S\n\nQ\n\nR")
    ids += chat.completion_ids("reply") + chat.reply_ids(["1", "2"], [Message("user", "3"), Message(role, "4")])
    assert tokenizer.decode(ids) == conversation(chat, "S\n\nQ\n\nR", "reply", "1\n\n2\n\n3\n\n4")


def test_a_prompt_that_no_fit_makes_right_is_refused_in_one_line() -> None:
    chat = Chat(tokenizer_of(STRICT), tool_role="user")
    with pytest.raises(TemplateFault, match=r"^the chat template raises 'roles must alternate' for messages of .*$"):
        chat.prompt_ids([Message("assistant", "A"), Message("user", "Q")])


def test_a_template_that_raises_at_every_conversation_is_refused_in_one_line() -> None:
    for template, said in (
        ("{{ raise_exception('no\nroles') }}", "raises 'no roles'"),
        ("{{ messages[0]['content'] + none }}", "raises "),
        ("{% for m in messages %}{{ m.missing.field }}{% endfor %}", "raises "),
        ("{% if %}", "raises "),
    ):
        with pytest.raises(TemplateFault, match=rf"^the chat template {said}.*$"):
            Chat(tokenizer_of(template))


def test_a_turn_ends_with_the_token_that_the_template_closes_it_with() -> None:
    for name, end in (("phi3_5", "<|end|>"), ("qwen2_5", "<|im_end|>"), ("gemma4", "<turn|>")):
        tokenizer = tokenizer_of(FAMILIES[name])
        end_id, eos_id = tokenizer.convert_tokens_to_ids([end, EOS])
        for stop_ids in ([], [eos_id], [eos_id, end_id]):
            chat = Chat(tokenizer, tool_role="user", stop_ids=stop_ids)
            assert chat.end_of_turn_id == end_id and chat.stop_ids == {end_id, eos_id}
            assert chat.completion_ids("hi")[-1] == end_id
            whole = conversation(chat, "Q", "reply", "1")
            assert tokenizer.decode(
                chat.prompt_ids([Message("user", "Q")]) + chat.completion_ids("reply") + chat.reply_ids(["1"])
            ) in (whole, whole.removeprefix("<s>"))


def test_a_role_token_ends_a_turn_where_it_stops_the_sampling() -> None:
    template = FAMILIES["glm4moe"]
    tokenizer = tokenizer_of(template)
    with pytest.raises(TemplateFault, match="must end an assistant turn with eos_token"):
        Chat(tokenizer)
    user, observation = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    chat = Chat(tokenizer, stop_ids=[user, observation])
    assert chat.end_of_turn_id == observation
    assert user not in chat.reply_ids(["1"]) and observation not in chat.reply_ids(["1"])
    assert chat.stop_ids >= {user, observation}


def test_a_thought_is_opened_where_the_template_opens_it() -> None:
    chat = chat_of("deepseekv3", FAMILIES["deepseekv3"], call_format="json")
    prompt_ids, reply_ids = chat.prompt_ids(prompt("S", "Q")), chat.reply_ids(["1"])
    assert chat.opens_thought
    draft = written_call(ToolCall("python", {"code": "1"}), "json")
    assert not chat.parse(draft, prompt_ids).calls and chat.parse(draft, reply_ids).calls
    assert "</think>" in chat.decode(chat.completion_ids(draft, prompt_ids))
    assert chat.decode(chat.completion_ids(draft, reply_ids)) == draft


def test_variables_of_the_template_are_handed_on() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3_5_think"])
    assert Chat(tokenizer).opens_thought
    chat = Chat(tokenizer, template_kwargs={"enable_thinking": False})
    assert not chat.opens_thought
    assert tokenizer.decode(chat.prompt_ids(prompt("S", "Q"))).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="got 'enable_thinkin'; did you mean 'enable_thinking'"):
        Chat(tokenizer, template_kwargs={"enable_thinkin": False})
    names: list[dict[str, Any]] = [{"messages": []}, {"tokenize": True}, {"": 1}]
    for kwargs in names:
        name = json.dumps(next(iter(kwargs))).replace('"', "'")
        with pytest.raises(ValueError, match=rf"chat\.template_kwargs must .* got {name}(; did you mean .*)?$"):
            Chat(tokenizer, template_kwargs=kwargs)
    with pytest.raises(ValueError, match=r"chat\.template_kwargs\.enable_thinking must be a text, .* got a date$"):
        Chat(tokenizer, template_kwargs={"enable_thinking": datetime.date(2026, 12, 1)})


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen2_5"])
    plain = Chat(tokenizer, call_format="json")
    tokenizer.chat_template = {"default": CHATML, "tool_use": FAMILIES["qwen2_5"]}
    chat = Chat(tokenizer, call_format="json")
    assert chat.offers_tools and chat.reply_ids(["1"]) == plain.reply_ids(["1"])
    assert Chat(tokenizer).reply_ids(["1"]) == Chat(tokenizer_of(CHATML)).reply_ids(["1"]) != plain.reply_ids(["1"])
    tokenizer.chat_template = {"rag": FAMILIES["qwen2_5"]}
    for kwargs in ({}, {"enable_thinking": True}):
        with pytest.raises(ValueError, match=r"^the chat template must be one: .*default.*$"):
            Chat(tokenizer, template_kwargs=kwargs)
