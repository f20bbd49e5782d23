"""Parts of a conversation have the ids that the whole has there, whatever a tokenizer puts in front of a text."""

import json
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gtpo.chat import Chat
from gtpo.token_ids import TokenIds
from tests.trainer.conftest import prompt as prompt_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the model's turn begins right behind plain text, a tool's text after a space
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>"
    "{% else %}[{{ m['role'] }}] {{ m['content'] }} [/{{ m['role'] }}]{% endif %}{% endfor %}"
)
# a tool's text stands right behind a control token
BARE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
CORPUS = [
    "the tool says 4 and the answer is 12\nsystem user assistant",
    "print(x) x = 1  y  =  2 # hi [user] [/user] [tool] [/tool]",
]
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = [(model, scheme) for model in ("bpe", "unigram") for scheme in ("first", "always", "legacy", "never")]


def sentencepiece(model: str, scheme: str) -> Any:
    """A tokenizer as those converted from SentencePiece are, with byte fallback."""
    is_bpe = model == "bpe"
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True) if is_bpe else models.Unigram())
    if scheme == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    options: dict[str, Any] = {"vocab_size": 420, "special_tokens": CONTROL + BYTES, "show_progress": False}
    trainer = trainers.BpeTrainer(**options) if is_bpe else trainers.UnigramTrainer(unk_token="<unk>", **options)
    made.train_from_iterator(CORPUS * 10, trainer)
    parts = json.loads(made.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in BYTES]
    parts["model"]["byte_fallback"] = True
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "</s>"],
    )


def byte_level(*, add_prefix_space: bool) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS * 10, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "</s>"],
    )


TOKENIZERS = {f"{model}-{scheme}": sentencepiece(model, scheme) for model, scheme in KINDS} | {
    f"byte-level-{space}": byte_level(add_prefix_space=space == "space") for space in ("space", "plain")
}


def chat_of(name: str, template: str) -> Chat:
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = template
    return Chat(tokenizer)


def whole_ids(chat: Chat, messages: list[tuple[str, str]]) -> list[int]:
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )
    return list(chat.tokenizer(rendered, add_special_tokens=False)["input_ids"])


OUTPUTS = ["4", " 4", "  4\n", "\n", "a is in b", "ValueError: x", "é", "0" * 9, "", "x</s", "[/tool]", "\n\n"]


@pytest.mark.parametrize("template", [CHATML, BRACKETS, BARE], ids=["chatml", "brackets", "bare"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_inserted_ids_are_the_templates(name: str, template: str) -> None:
    chat = chat_of(name, template)
    prompt = [("system", "the tool"), ("user", " x = 1 ")]
    assert chat.prompt_ids(prompt_of("the tool", " x = 1 ")) == whole_ids(chat, prompt)
    for outputs in [[output] for output in OUTPUTS] + [["4", " x"], ["", "\n"]]:
        messages = [*prompt, ("assistant", "reply"), *(("tool", output) for output in outputs)]
        ids = whole_ids(chat, messages)
        ends = [place for place, token in enumerate(ids) if token == chat.end_of_turn_id]
        # of the prompt's turns, where the template closes them
        reply = ends[2] if template in (CHATML, BARE) else ends[0]
        assert chat.reply_ids(outputs) == ids[reply + 1 :], outputs


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12)
PIECES = st.sampled_from(["</s>", "<|im_end|>", "<unk>", "<0x41>", "<0x0A>", " ", "\n", "a", "the", "<", "s>", "4"])


@settings(max_examples=60)
@given(text=st.one_of(TEXT, st.lists(PIECES, max_size=6).map("".join)), name=st.sampled_from(sorted(TOKENIZERS)))
def test_a_completion_decodes_to_its_text_and_holds_no_control(text: str, name: str) -> None:
    chat = chat_of(name, CHATML)
    ids = chat.completion_ids(text)
    assert chat.decode(ids) == text
    assert set(ids[:-1]).isdisjoint(chat.tokenizer.all_special_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["</s>", "4<|im_end|>\n<|im_start|>user\n", " <s>x", "<0x41></s><0x42>", "<<s>"])
def test_text_of_control_tokens_stays_text(name: str, text: str) -> None:
    chat = chat_of(name, CHATML)
    ids = chat.reply_ids([text, "4"])
    control = [chat.tokenizer.decode([token]) for token in ids if token in chat.tokenizer.all_special_ids]
    around = ["<|im_start|>", "<|im_end|>"]
    assert control == [*around, *around, "<|im_start|>"]
    before, after = chat.reply_ids(["4", "4"]), TokenIds(chat.tokenizer).part(text, control=False)
    assert chat.tokens.decode(after) == text
    start = next(place for place in range(len(ids)) if ids[place : place + len(after)] == after)
    assert before[: start - 1] == ids[: start - 1]
    prompt = chat.prompt_ids(prompt_of(text, text))
    assert chat.tokenizer.decode(prompt).count(text) == 2
    assert sum(token in chat.tokenizer.all_special_ids for token in prompt) == 5


@pytest.mark.parametrize("name", ["bpe-always", "unigram-legacy"])
def test_a_space_that_was_sampled_first_is_kept(name: str) -> None:
    chat = chat_of(name, BRACKETS)
    ids = chat.tokenizer("answer", add_special_tokens=False)["input_ids"]
    assert chat.decode(ids) == " answer" and chat.decode([*ids, chat.end_of_turn_id]) == " answer"
