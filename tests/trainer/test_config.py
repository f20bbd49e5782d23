"""Configuration: presets, overrides, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest

from gtpo.config import METHODS, config_from_dict, config_to_dict, load_config


@pytest.mark.parametrize("method", METHODS)
def test_presets_fill_credit_and_come_back_from_plain_data(method: str) -> None:
    config = config_from_dict({"method": method})
    assert config.credit == METHODS[method]
    assert config_from_dict(config_to_dict(config)) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('method = "grpo"\n[train]\nsteps = 3\n[credit]\neps = 0.1\n')
    config = load_config(path, ["--train.steps", "7", "--rollout.group-size=4", "--output_dir", "runs/a"])
    assert (config.train.steps, config.rollout.group_size, config.output_dir) == (7, 4, "runs/a")
    assert (config.credit.eps, config.credit.gamma) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian": {}}, "unknown config key 'trian'; did you mean 'train'"),
        ({"train": {"step": 1}}, r"unknown config key 'train\.step'; did you mean 'train\.steps'"),
        ({"environments": [{"name": "retry", "size": 1}]}, r"unknown config key 'environments\.0\.size'"),
        ({"train": 3}, "'train' must be a table, got 3"),
        ({"train": {"steps": "many"}}, r"'train\.steps'.*got 'many'"),
        ({"method": "ppo"}, "method must be one of gtpo, gtpo_dense, grpo, .*; got 'ppo'"),
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size must be at least 2, got 1"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature must be above 0"),
        ({"credit": {"gamma": 1.5}}, r"credit\.gamma must be in \[0, 1\], got 1\.5"),
        ({"environments": []}, "at least one environment, got none"),
        ({"environments": [{"name": "retry", "weight": 0}]}, r"environments\.0\.weight must be above 0, got 0"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, r"num_heads must be a multiple of .* = 2, got 3"),
        ({"model": {"head_dim": 3}}, r"model\.head_dim must be even, got 3"),
        ({"rollout": {"call_format": "json", "tools": []}}, r"rollout\.tools must name at least one tool"),
        (
            {"rollout": {"tools": ["python", "python"]}},
            r"rollout\.tools must name .* each once; got \['python', 'python'",
        ),
        ({"credit": {"similarity": "foo"}}, r"'credit\.similarity': Input should be 'ngram', got 'foo'"),
        (
            {"method": "grpo", "credit": {"similarity_alpha": 0.5}},
            r"reward = \"outcome\" pays no term of a turn.*: credit\.similarity_alpha, got 0\.5$",
        ),
        ({"credit": {"reward": "outcome"}}, r"format_penalty, got 0\.1, credit\.similarity_alpha, got 0\.5$"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("num_threads", -1),
        ("credit.eps", -1.0),
        ("credit.ddof", 5),
        ("credit.clip_low", -1.0),
        ("credit.clip_high", float("nan")),
        ("credit.format_penalty", -0.1),
        ("credit.execution_bonus", -2.0),
        ("model.num_layers", 0),
        ("tasks.num_eval", 0),
        ("rollout.tool_join_steps", -5),
        ("sandbox.max_concurrent", 0),
        ("sft.batch_size", 0),
        ("sft.num_demonstrations", 0),
        ("train.max_grad_norm", 0.0),
        ("train.learning_rate", -1.0),
        ("train.learning_rate", float("inf")),
        ("train.steps", -1),
        ("train.warmup_steps", -3),
        ("train.eval_every", -1),
        ("eval.temperature", 0.0),
    ],
)
def test_numbers_out_of_range_are_named(key: str, value: float) -> None:
    raw: dict[str, Any] = {}
    *tables, last = key.split(".")
    (raw.setdefault(tables[0], {}) if tables else raw)[last] = value
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} must be .*, got {re.escape(str(value))}$"):
        config_from_dict(raw)


def test_an_entry_of_a_list_is_overridden_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[[environments]]\nname = "retry"\n[[environments]]\nname = "jsonl"\n')
    words = ["--environments.1.weight", "2.5", "--environments.1.options.path=a.jsonl"]
    first, second = load_config(path, words).environments
    assert (first.weight, second.weight, second.options) == (1.0, 2.5, {"path": "a.jsonl"})
    for key, expected in (("2.weight", "one of 2 entries, from 0, got '2'"), ("a.weight", "got 'a'")):
        with pytest.raises(ValueError, match=expected):
            load_config(path, [f"--environments.{key}", "1"])
    with pytest.raises(ValueError, match=r"--environments\.0: 'environments' is not a table of the config"):
        load_config(path, ["--environments.0", "1"])
    with pytest.raises(ValueError, match=r"--seed\.a\.b: what stands before 'a' is not a table of the config"):
        load_config(path, ["--seed", "1", "--seed.a.b", "1"])


@pytest.mark.parametrize("text", ["2026-11-23", "7", "1e3", "true", "[x]", "a b", '"quoted"'])
def test_a_text_needs_no_quotes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[[environments]]\nname = "retry"\n')
    config = load_config(path, ["--output_dir", text, f"--model.source={text}", "--environments.0.name", text])
    assert {config.output_dir, config.model.source, config.environments[0].name} == {text.strip('"')}


def test_what_is_no_text_keeps_its_type(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[[environments]]\nname = "retry"\n')
    words = [
        "--environments.0.options.num_items",
        "3",
        "--rollout.tools",
        '["python", "search"]',
        "--tools.search.limit",
        "7",
    ]
    config = load_config(path, [*words, "--eval.temperature", "1"])
    assert config.environments[0].options == {"num_items": 3}
    assert (config.rollout.tools, config.tools, config.eval.temperature) == (
        ("python", "search"),
        {"search": {"limit": 7}},
        1.0,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps"], "expected --key value, got 'steps'"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "--seed", "1"], "--train.steps needs a value"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ValueError, match=message):
        load_config(path, words)
