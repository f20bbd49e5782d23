"""TRL with rewards of turns: a tiny model learns to look before it answers, on a CPU in seconds.

The environment, its tool and the dataset are as any TRL user writes them.  New is that a reward function may return a
list with one reward for each turn, and that `GTPOTrainer` credits every turn with its own return.
Needs TRL: pip install "trl==1.16.0".
"""

import tempfile
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig

from gtpo.adapters.trl import GTPOTrainer

CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
WORDS = ("user", "assistant", "tool", "what", "is", "there", "box", "empty", "done", "red", "blue", "look")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
PARSER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|> assistant",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class Box:
    """An environment as TRL takes it: `reset`, and every other public method is a tool."""

    def reset(self, **columns: Any) -> None:
        self.looks = 0

    def look(self) -> str:
        """
        Look into the box.
        """
        self.looks += 1
        return "box is empty"


def first_look(completions: list[list[dict[str, Any]]], **columns: Any) -> list[list[float]]:
    """One reward a turn: 0.5 for the first one that read the tool's answer, -0.2 for each further call."""
    rewards = []
    for messages in completions:
        turns, looked = [], False
        for message, following in zip(messages, [*messages[1:], None], strict=True):
            if message["role"] == "assistant":
                calls = len(message.get("tool_calls") or [])
                is_first = not looked and following is not None
                turns.append(0.5 * is_first - 0.2 * max(calls - is_first, 0))
                looked = looked or is_first
        rewards.append(turns)
    return rewards


def answered(completions: list[list[dict[str, Any]]], environments: list[Box], **columns: Any) -> list[float]:
    """One reward a trajectory, which goes to its last turn: it looked, and the last message begins with "done"."""
    last = [messages[-1] for messages in completions]
    return [
        float(box.looks > 0 and message["role"] == "assistant" and message.get("content", "").startswith("done"))
        for box, message in zip(environments, last, strict=True)
    ]


def build_model() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A random model of one layer, and a tokenizer to which a whole call is one token."""
    special = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", CALL]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|im_end|>"
    )
    tokenizer.add_tokens(["<|im_start|>", CALL], special_tokens=False)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, PARSER
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        initializer_range=0.1,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config), tokenizer


def build_trainer(
    folder: str,
    *,
    steps: int = 32,
    trainer: type = GTPOTrainer,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of TRL on the task above.  arguments: of `GRPOConfig`, options: of `trainer`."""
    model, tokenizer = build_model()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 64,
        "num_generations": 16,
        "max_completion_length": 48,
        "max_tool_calling_iterations": 3,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "epsilon_high": 0.28,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return trainer(
        model=model,
        args=GRPOConfig(output_dir=folder, **{**settings, **(arguments or {})}),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "what is there"}]] * 4}),
        processing_class=tokenizer,
        **{"environment_factory": Box, "reward_funcs": [first_look, answered], **options},
    )


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, credit={"gamma": 0.9})
        trainer.train()
    logs = [line for line in trainer.state.log_history if "reward" in line]
    for line in (logs[0], logs[-1]):
        print(
            f"step {line['step']:2d}: reward {line['reward']:.2f}, calls {line['tools/call_frequency']:.2f}, "
            f"answered {line['rewards/answered/mean']:.2f}, turns {line['turns/mean']:.2f}"
        )


if __name__ == "__main__":
    main()
