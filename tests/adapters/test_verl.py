"""The verl adapter, called as verl calls it; `foreign/test_verl.py` has verl itself."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gtpo.adapters import verl
from tests.adapters.attempts import ATTEMPTS, BY_TOKEN, MASK, TURN_IDS, assert_close, padded, token_rewards


def test_verl_estimator() -> None:
    uids = np.array(ATTEMPTS.groups, dtype=object)
    config = {"gamma": 0.9, "gtpo": {"eps": 1e-6}}
    advantages, returns = verl.gtpo_advantages(token_rewards(), MASK, index=uids, config=config)
    assert_close(advantages, padded(BY_TOKEN))
    assert returns.shape == advantages.shape
    # verl's default discount is 1, and what stands under algorithm.gtpo comes before it
    plain = verl.gtpo_advantages(token_rewards(), MASK, index=uids, config={"gamma": 1.0})[0]
    assert not torch.allclose(plain, advantages)
    assert_close(
        verl.gtpo_advantages(token_rewards(), MASK, uids, {"gamma": 1.0, "gtpo": {"gamma": 0.9}})[0], advantages
    )
    with pytest.raises(ValueError, match="index must hold the uid"):
        verl.gtpo_advantages(token_rewards(), MASK)


def test_verl_preset_keeps_its_discount() -> None:
    """verl's default for algorithm.gamma is 1, which says nothing about a preset that was asked for by name."""
    arguments = (token_rewards(), MASK, ATTEMPTS.groups)
    by_name = verl.gtpo_advantages(*arguments, {"gamma": 1.0, "gtpo": {"method": "gtpo"}})[0]
    assert_close(by_name, padded(BY_TOKEN))
    changed = verl.gtpo_advantages(*arguments, {"gamma": 1.0, "gtpo": {"method": "gtpo", "gamma": 0.5}})[0]
    assert_close(changed, verl.gtpo_advantages(*arguments, {"gamma": 0.5})[0])
    with pytest.raises(ValueError, match=r"algorithm.gamma=0.5 is no discount of the credit, which has 0.9: change it"):
        verl.gtpo_advantages(*arguments, {"gamma": 0.5, "gtpo": {"method": "gtpo"}})


def test_verl_rejection_is_refused() -> None:
    """It rewrites `response_mask` before advantages are made: a token out of a turn would make two of it."""
    arguments = (token_rewards(), MASK, ATTEMPTS.groups)
    with pytest.raises(ValueError, match=r"rollout_correction.rollout_rs='token_k1' cuts tokens out"):
        verl.gtpo_advantages(*arguments, {"gamma": 0.9, "rollout_correction": {"rollout_rs": "token_k1"}})
    for harmless in (
        {"rollout_is": "token", "rollout_rs": None},
        {"rollout_rs": "seq_mean_k1", "bypass_mode": True},
        None,
    ):
        found = verl.gtpo_advantages(*arguments, {"gamma": 0.9, "rollout_correction": harmless})[0]
        assert_close(found, padded(BY_TOKEN))


def test_verl_options_are_those_of_a_credit() -> None:
    arguments = (token_rewards(), MASK, ATTEMPTS.groups)
    half = {"method": "matchtir", "terms": {1: {"weight": 0.3}}}
    assert verl.gtpo_advantages(*arguments, {"gtpo": half})[0].isfinite().all()
    # the discount that verl always sends is none of a reward that is not discounted
    config = {"gamma": 1.0, "gtpo": {"quantity": "turn_reward", "scope": "none"}}
    rows = zip(ATTEMPTS.rewards, TURN_IDS, strict=True)
    expected = padded([0.0 if turn < 0 else rewards[turn] for turn in turns] for rewards, turns in rows)
    assert_close(verl.gtpo_advantages(*arguments, config)[0], expected)
    for options, message in (
        ({"gama": 1}, "a credit has no field gama"),
        ({"method": "gspo", "clip_low": 0.1}, "a credit has no clip_low: rewards and loss are the trainer's"),
        ({"method": "mt_grpo"}, "'mt_grpo' needs outcomes, turns_with_calls, which is not given here"),
        ({"terms": [{"wait": 0.3}]}, "terms.0 has no field wait"),
        ({"scale": "none", "eps": 0.1}, "credit.terms.0.eps has no effect with credit.terms.0.scale = 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            verl.gtpo_advantages(*arguments, {"gtpo": options})


class ActorConfig(SimpleNamespace):
    def get(self, name: str, default: object = None) -> Any:
        return getattr(self, name, default)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
@pytest.mark.parametrize("is_global", [False, True])
def test_verl_loss_aggregates_as_verl_does(mode: str, is_global: bool) -> None:
    """Against the formulas of verl's `agg_loss`, by hand; with counts of a batch larger than the one here."""
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(2, *MASK.shape, generator=generator)
    new = (old + 0.3 * torch.randn(old.shape, generator=generator)).requires_grad_()
    weights = torch.rand(old.shape, generator=generator)
    mask = MASK.clone()
    mask[2] = 0  # a sequence masked as a whole counts for nothing
    info = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 7} if is_global else {}
    config = ActorConfig(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, global_batch_info=info)
    loss, metrics = verl.gtpo_policy_loss(old, new, advantages, mask.bool(), mode, config, weights)
    loss -= 0.1 * new.sum()  # as verl subtracts its entropy term, in place
    (gradient,) = torch.autograd.grad(loss, new)

    ratio = (new - old).exp()
    token_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.28) * advantages) * weights * mask
    tokens = mask.sum(1)
    num_sequences = 16 if is_global else (tokens > 0).sum()
    expected = {
        "token-mean": token_loss.sum() / (100 if is_global else tokens.sum()),
        "token-sum": token_loss.sum(),
        "seq-mean-token-sum": token_loss.sum() / num_sequences,
        "seq-mean-token-sum-norm": token_loss.sum() / num_sequences / (7 if is_global else mask.shape[1]),
        "seq-mean-token-mean": (token_loss.sum(1) / (tokens + 1e-8)).sum() / num_sequences,
    }[mode] * info.get("dp_size", 1) - 0.1 * new.sum()
    assert_close(loss, expected)
    assert_close(gradient, torch.autograd.grad(expected, new)[0])
    assert 0.0 < metrics["actor/pg_clipfrac"] < 1.0


def test_verl_loss_modes_by_hand() -> None:
    """Two turns of ratios e, 1 and 1, 1/e; their means are e^1/2 and e^-1/2, that of the sequence is 1."""
    log_ratio = torch.tensor([[1.0, 0.0, 0.0, 0.0, -1.0]])
    mask, advantages = torch.tensor([[1, 1, 0, 1, 1]]).bool(), torch.tensor([[1.0, 1.0, 9.0, -1.0, -1.0]])
    config = ActorConfig(clip_ratio=0.5, clip_ratio_c=1.6, global_batch_info={})
    e = torch.tensor(1.0).exp().item()
    expected = {
        "gtpo": ([0.0, 1.0, 0.0, -1.0, 0.0], 1.5 + 1.0 - 1.0 - 0.5),
        "gtpo_turn": ([0.0, 0.0, 0.0, -(e**-0.5), -(e**-0.5)], 2 * 1.5 - 2 * e**-0.5),
        "gtpo_sequence": ([1.0, 1.0, 0.0, -1.0, -1.0], 0.0),
        "gtpo_cispo": ([1.5, 1.0, 0.0, -1.0, -0.5], 1.5 * 1.0 + 0.5 * 1.0),
        "gtpo_reinforce": ([1.0, 1.0, 0.0, -1.0, -1.0], 1.0 + 1.0),
    }
    for name, (slopes, gain) in expected.items():
        new = log_ratio.clone().requires_grad_()
        arguments = (torch.zeros(1, 5), new, advantages, mask, "token-sum", config)
        loss, metrics = verl.LOSS_MODES[name](*arguments)
        assert loss.item() == pytest.approx(-gain, rel=1e-5, abs=1e-6), name
        assert (-torch.autograd.grad(loss, new)[0][0]).tolist() == pytest.approx(slopes, rel=1e-5), name
        assert metrics["actor/pg_clipfrac_lower"] == 0.0
    # a ratio of e and a negative advantage: no more than clip_ratio_c counts
    new = log_ratio.clone().requires_grad_()
    loss, metrics = verl.gtpo_policy_loss(torch.zeros(1, 5), new, -advantages, mask, "token-sum", config)
    assert loss.item() == pytest.approx(1.6 + 1.0 - 1.0 - e**-1, rel=1e-5)
    assert metrics["actor/pg_clipfrac_lower"] == 0.25


def test_verl_loss_refuses_what_it_cannot_divide_by() -> None:
    rows = torch.zeros(1, 2)
    config = ActorConfig(clip_ratio=0.2, global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="batch_num_tokens of the whole batch is needed with dp_size=2"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "token-mean", config)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of verl's, got 'mean'"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "mean", config)
