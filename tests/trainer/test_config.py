"""Configuration: presets, overrides, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest

from gtpo.config import METHODS, Method, RolloutConfig, config_from_dict, config_to_dict, load_config


@pytest.mark.parametrize("method", METHODS)
def test_presets_fill_the_tables_and_come_back_from_plain_data(method: str) -> None:
    config = config_from_dict({"method": method})
    assert Method(config.reward, config.credit, config.loss) == METHODS[method]
    assert config_from_dict(config_to_dict(config)) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('method = "grpo"\n[train]\nsteps = 3\n[credit.terms.0]\neps = 0.1\n')
    config = load_config(path, ["--train.steps", "7", "--rollout.group-size=4", "--output_dir", "runs/a"])
    assert (config.train.steps, config.rollout.group_size, config.output_dir) == (7, 4, "runs/a")
    (term,) = config.credit.terms
    assert (term.eps, term.gamma) == (0.1, 1.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian": {}}, "unknown config key 'trian'; did you mean 'train'"),
        ({"train": {"step": 1}}, r"unknown config key 'train\.step'; did you mean 'train\.steps'"),
        ({"environments": [{"name": "retry", "size": 1}]}, r"unknown config key 'environments\.0\.size'"),
        ({"train": 3}, "'train' must be a table, got 3"),
        ({"train": {"steps": "many"}}, r"'train\.steps'.*got 'many'"),
        ({"method": "ppo"}, "method must be one of gtpo, gtpo_dense, gtpo_batch, .*; got 'ppo'"),
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size must be at least 2, got 1"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature must be above 0"),
        ({"credit": {"terms": [{"gamma": 1.5}]}}, r"credit\.terms\.0\.gamma must be in \[0, 1\], got 1\.5"),
        ({"environments": []}, "at least one environment, got none"),
        ({"environments": [{"name": "retry", "weight": 0}]}, r"environments\.0\.weight must be above 0, got 0"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, r"num_heads must be a multiple of .* = 2, got 3"),
        ({"model": {"head_dim": 3}}, r"model\.head_dim must be even, got 3"),
        ({"rollout": {"call_format": "json", "tools": []}}, r"rollout\.tools must name at least one tool"),
        (
            {"rollout": {"tools": ["python", "python"]}},
            r"rollout\.tools must name .* each once; got \['python', 'python'",
        ),
        ({"reward": {"similarity": "foo"}}, r"'reward\.similarity': Input should be 'ngram', got 'foo'"),
        ({"reward": {"format_faults": ["typo"]}}, r"'reward\.format_faults\.0': Input should be .*, got 'typo'"),
        ({"loss": {"gamma": 1.0}}, r"unknown config key 'loss\.gamma'; did you mean 'credit\.terms\.0\.gamma'"),
        ({"reward": {"kl": "k3"}}, r"unknown config key 'reward\.kl'; did you mean 'loss\.kl'"),
        ({"credit": {"term": []}}, r"unknown config key 'credit\.term'; did you mean 'credit\.terms'"),
        ({"credit": {"terms": []}}, r"credit\.terms must hold at least one term, got none"),
        ({"credit": {"terms": {"1": {}}}}, r"credit\.terms\.1: expected the number of one of 1 terms, .* got '1'"),
        ({"credit": {"terms": {"0": 3}}}, r"'credit\.terms\.0' must be a table, got 3"),
        ({"credit": {"terms": 3}}, r"'credit\.terms' must be a list of tables, got 3"),
        ({"loss": 3}, "'loss' must be a table, got 3"),
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
        ("credit.terms.0.eps", -1.0),
        ("credit.terms.0.ddof", 5),
        ("credit.terms.0.weight", float("nan")),
        ("loss.clip_low", -1.0),
        ("loss.clip_high", float("nan")),
        ("loss.dual_clip", 1.0),
        ("reward.format_penalty", -0.1),
        ("reward.execution_bonus", -2.0),
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
        ("eval.temperature", -0.1),
    ],
)
def test_numbers_out_of_range_are_named(key: str, value: float) -> None:
    raw: dict[str, Any] = {}
    *tables, last = key.split(".")
    table = raw
    for name in tables:
        table = table.setdefault(name, {})
    table[last] = value
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


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("credit.clip_low", "loss.clip_low"),
        ("credit.kl", "loss.kl"),
        ("credit.mask_truncated", "loss.mask_truncated"),
        ("credit.similarity_alpha", "reward.similarity_alpha"),
        ("credit.gamma", "credit.terms.0.gamma"),
        ("credit.weight", "credit.terms.0.weight"),
        ("credit.reward", 'reward.outcome_needs_format, true for what was "outcome"'),
        ("credit.extra_terms", "credit.terms, where entry 0 is the first term: extra_terms.0 is terms.1"),
        ("credit.extra_terms.0.weight", "credit.terms, where entry 0 is the first term: extra_terms.0 is terms.1"),
        ("rollout.mask_void_turns", "loss.mask_void_turns"),
    ],
)
def test_a_key_that_moved_says_where_to(tmp_path: Path, key: str, place: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    old = ".".join(key.split(".")[:2])
    with pytest.raises(ValueError, match=f"^{re.escape(f'{old} is now {place}')}$"):
        load_config(path, [f"--{key}", "1"])


def test_a_method_is_overridden_in_its_three_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'method = "matchtir"\n[reward]\nformat_penalty = 0.3\n[credit.terms.1]\ngamma = 1.0\n[loss]\nclip_low = 0.1\n'
    )
    words = ["--loss.clip_high", "0.3", "--credit.terms.0.weight", "0.25", "--reward.format_faults", '["invalid_call"]']
    config = load_config(path, words)
    preset = METHODS["matchtir"]
    assert (config.reward.format_penalty, config.reward.format_faults) == (0.3, ("invalid_call",))
    assert [(term.weight, term.gamma) for term in config.credit.terms] == [(0.25, 1.0), (0.5, 1.0)]
    assert [term.scope for term in config.credit.terms] == [term.scope for term in preset.credit.terms]
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.kl) == (0.1, 0.3, preset.loss.kl)
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "kind", "low", "high"),
    [("tis", "truncated", 0.5, 2.0), ("mis", "masked", 0.0, 2.0), ("icepop", "masked", 0.5, 5.0)],
)
def test_a_rollout_correction_has_a_name(tmp_path: Path, name: str, kind: str, low: float, high: float) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[loss]\nrollout_correction = "{name}"\n')
    loss = load_config(path).loss
    found = (loss.rollout_correction, loss.rollout_correction_level)
    assert found == (kind, "token")
    assert (loss.rollout_correction_low, loss.rollout_correction_high) == (low, high)
    changed = load_config(path, ["--loss.rollout_correction_high", "3.0"]).loss
    assert changed.rollout_correction_high == 3.0 and changed.rollout_correction_low == low
    # over the settings of another one, which a file may have
    path.write_text('[loss]\nrollout_correction = "masked"\nrollout_correction_high = 9.0\n')
    assert load_config(path, ["--loss.rollout_correction", name]).loss.rollout_correction_high == 9.0
    with pytest.raises(ValueError, match=r"'loss\.rollout_correction': Input should be .*, got 'tiss'"):
        load_config(path, ["--loss.rollout_correction", "tiss"])


@pytest.mark.parametrize("path", ["examples/demo.toml", ".ci/repeat.toml"])
def test_what_is_run_twice_and_compared_has_a_schedule_of_its_own(path: str) -> None:
    """By default a tool's result joins at once, and rounding depends on how fast the tools were."""
    assert RolloutConfig().tool_join_steps == -1
    assert load_config(Path(__file__).parents[2] / path).rollout.tool_join_steps == 4
