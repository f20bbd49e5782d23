"""The prime-rl adapter, called as prime-rl calls it."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from gtpo.adapters import prime_rl
from gtpo.loss import loss_rule
from gtpo.methods import METHODS
from gtpo_kernels import clipped_loss
from tests.adapters.attempts import ATTEMPTS, EXPECTED, assert_close, outcomes_apart
from tests.adapters.verl_losses import assert_same, ragged


def test_prime_rl_assigns_sampled_tokens() -> None:
    turn_rewards, outcomes = outcomes_apart()
    rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == "a"]
    traces = []
    for i in rows:
        nodes = [SimpleNamespace(mask=[False] * 2)]  # the prompt
        for sampled, inserted in zip(ATTEMPTS.num_tokens[i], ATTEMPTS.num_tool_tokens[i], strict=True):
            nodes += [SimpleNamespace(mask=[True] * sampled), SimpleNamespace(mask=[False] * inserted)]
        traces.append(SimpleNamespace(nodes=nodes, info={"turn_rewards": turn_rewards[i]}, reward=outcomes[i]))
    assigned: list[list[float]] = []
    prime_rl.assign_turn_advantages(traces, lambda trace, values: assigned.append(values))
    for i, values in zip(rows, assigned, strict=True):
        expected = np.repeat(EXPECTED[i], ATTEMPTS.num_tokens[i]).tolist()
        assert values == pytest.approx(expected, rel=1e-5)


def test_prime_rl_loss_is_the_documented_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the example of a custom loss in prime-rl's documentation: a sum over the tokens of the mask."""
    for first, second in pairwise(("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss")):
        for name in (first, second):
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = SimpleNamespace  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 20, generator=generator)
    mask = torch.rand(20, generator=generator) > 0.3
    inputs = SimpleNamespace(
        trainer_logprobs=new, inference_logprobs=old, advantages=advantages, loss_mask=mask, loss_weights=None
    )
    result = prime_rl.gtpo_loss(inputs, clip_low=0.2, clip_high=0.2)
    ratio = (new - old).exp()
    expected = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].sum()
    assert_close(result.loss, expected)
    assert result.metrics.keys() == {"clip_low", "clip_high", "mismatch_kl"}
    with pytest.raises(ValueError, match="may hold clip_low and clip_high, got clip_eps"):
        prime_rl.gtpo_loss(inputs, clip_eps=0.2)


@pytest.mark.parametrize("name", ["ipo", "dppo"])
def test_the_presets_have_the_losses_of_prime_rl(name: str) -> None:
    """Restated from its loss.py: `ipo_loss_fn`, the default since August, and the one before, `default_loss_fn`, whose
    kl_tau is 0 here: it is no part of DPPO."""
    rule, num_cut = METHODS[name].loss, 0
    for seed in range(100):
        rows = ragged(seed)
        inference, mask = rows.old_logprobs, rows.mask
        leaf = rows.logprobs.clone().requires_grad_()
        change = leaf.exp() - inference.exp()
        if name == "ipo":
            masked, kl_tau = change.abs() > 0.1, 1e-3
        else:
            masked, kl_tau = torch.where(rows.advantages > 0, change > 0.2, change < -0.2), 0.0
        log_ratio = leaf - inference
        by_token = -(~masked * rows.advantages * log_ratio.exp()) + kl_tau * log_ratio.square()
        expected = (by_token * mask).sum() / mask.sum()
        ours = rows.logprobs.clone().requires_grad_()
        found = clipped_loss(
            ours.flatten(),
            rows.advantages.flatten(),
            loss_mask=mask.flatten(),
            old_logprobs=inference.flatten(),
            ref_logprobs=inference.flatten() if rule.kl_reference == "sampler" else None,
            clip_low=rule.clip_low,
            clip_high=rule.clip_high,
            rule=loss_rule(rule),
        ).loss
        num_cut += int((masked & mask).sum())
        of_ours, of_theirs = (torch.autograd.grad(value, each)[0] for value, each in ((found, ours), (expected, leaf)))
        assert_same((found.detach(), of_ours), (expected.detach(), of_theirs))
    assert num_cut > 100
