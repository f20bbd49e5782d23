"""The chat templates that the package trl carries, each tried as a run would; writes the table of docs/models.md.

Run it as `python -m tests.trainer.chat_families` after a change of what a template may do.
"""

import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gtpo.chat import Chat

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
# no family closes a turn with it, as base models whose eos_token ends the document do not
EOS = "<|endoftext|>"
# what the generation config of a family lists beside it, where that is not what closes a turn
STOPS = {"glm4moe": ("<|user|>", "<|observation|>")}
_CONTROL = re.compile(r"<[|｜][^\s<>'\"{}]{1,40}>|<[^\s<>'\"{}]{1,40}[|｜]>|</?s>|<(?:start|end)_of_\w+>")


def families() -> dict[str, str]:
    """Each template by the name of its file."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None, "the extra bench installs trl"
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def tokenizer_of(template: str, *, eos: str = EOS, control: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes and of the control tokens that `template` writes; what Python calls <think> is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = sorted({*_CONTROL.findall(template), *control} - {eos, "<s>"})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=eos, additional_special_tokens=found
    )
    tokenizer.chat_template = template
    return tokenizer


def chat_of(name: str, template: str, **options: Any) -> Chat:
    stops = next((stops for family, stops in STOPS.items() if name.startswith(family)), ())
    tokenizer = tokenizer_of(template)
    return Chat(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(list(stops)), **options)


@functools.cache
def use_of(name: str, template: str) -> tuple[str, str, bool]:
    """The setting of rollout.tool_role with which a template trains, its end of a turn, and whether it offers tools in
    its own way; or "refused", why, and False."""
    reason = ""
    for role in ("tool", "user"):
        try:
            chat = chat_of(name, template, tool_role=role, call_format="json")
        except ValueError as error:
            reason = reason or str(error)
            continue
        return role, str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)), chat.offers_tools
    return "refused", reason, False


def rows() -> Iterator[str]:
    yield "| template | `tool_role` | tools | a turn ends with, or why it is refused |\n|---|---|---|---|\n"
    for name, template in families().items():
        use, why, offers = use_of(name, template)
        tools = "" if use == "refused" else "by the template" if offers else "by the protocol"
        row = f"| {name} | {use} | {tools} | {why if use == 'refused' else f'`{why}`'} |\n"
        yield row.replace("<|", "<\\|").replace("|>", "\\|>")


def written(page: str) -> str:
    """`page` with the table as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "".join(rows()) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
