"""A run with the chat template of another family: it trains, or `gtpo train` refuses it in one line."""

import re
from pathlib import Path

import pytest

from gtpo.__main__ import main
from gtpo.run_folder import read_rows
from tests.trainer.chat_families import families
from tests.trainer.conftest import tiny_policy
from tests.trainer.test_cli import refused
from tests.trainer.test_trainer import TINY_RUN, write_config

# the turns of Phi 3.5 and of Qwen 3 that thinks, with the control tokens of the tiny model
PHI = families()["phi3_5"].replace("<|end|>", "<|im_end|>").replace("<|user|>", "<|im_start|>")
THINKS = families()["qwen3_5_think"]
STRICT = families()["gemma"].replace("<start_of_turn>", "<|im_start|>").replace("<end_of_turn>", "<|im_end|>")


def folder_of(folder: Path, template: str, *, eos: str = "<|pad|>") -> Path:
    """A tiny model whose eos_token ends no turn, as those of base models do not."""
    policy = tiny_policy(vocab_size=400)
    policy.tokenizer.chat_template = template
    policy.tokenizer.eos_token = eos
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
    policy.save_model(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "role", "call_format"), [(PHI, "user", "code"), (THINKS, "tool", "json"), (STRICT, "user", "json")]
)
def test_a_run_with_the_template_of_another_family(tmp_path: Path, template: str, role: str, call_format: str) -> None:
    source = folder_of(tmp_path / "model", template)
    write_config(tmp_path, TINY_RUN)
    words = ["train", str(tmp_path / "config.toml"), f"--model.source={source}", f"--rollout.tool_role={role}"]
    words += ["--rollout.max_trajectory_tokens=3000", "--rollout.max_completion_tokens=200", "--train.steps=1"]
    words += [
        "--sft.steps=2",
        "--sft.batch_size=2",
        "--sft.num_demonstrations=4",
        f"--rollout.call_format={call_format}",
    ]
    words += ["--tasks.num_train=4", "--rollout.tasks_per_step=2", "--tasks.num_eval=2"]
    assert main(words) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # the demonstrations were right, so that there was something to warm up on
    assert [row["phase"] for row in rows] == ["sft", "sft", "eval", "train", "eval"]
    # a model that knows nothing yet writes the end of a turn soon enough: its sampling stopped there
    assert rows[3]["completions/clipped_ratio"] < 1 and rows[3]["completions/min_length"] < 200


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (STRICT, 'raises \'Conversation roles must alternate .*; set rollout.tool_role = "user"'),
        (
            families()["gptoss"],
            'raises \'Message has tool role, .*; with rollout.tool_role = "user", the chat template',
        ),
        ("{{ raise_exception('no') }}", "raises 'no' for messages of roles user"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "must end an assistant turn with eos_token"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, reason: str
) -> None:
    source = folder_of(tmp_path / "model", template)
    write_config(tmp_path)
    assert re.search(f"the chat template {reason}", refused(tmp_path, capsys, f"--model.source={source}"))
