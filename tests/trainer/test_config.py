"""Configuration: presets, overrides, refusals."""

from pathlib import Path

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
        ({"method": "ppo"}, "method must be one of gtpo, gtpo_dense, grpo; got 'ppo'"),
        ({"rollout": {"group_size": 1}}, r"rollout\.group_size must be at least 2, got 1"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature must be above 0"),
        ({"credit": {"gamma": 1.5}}, r"credit\.gamma must be in \[0, 1\], got 1\.5"),
        ({"environments": []}, "at least one environment, got none"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["steps"], "expected --key value, got 'steps'"), (["--train.steps"], "--train.steps needs a value")],
)
def test_bad_overrides_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    with pytest.raises(ValueError, match=message):
        load_config(path, words)
