"""The prime-rl adapter, called as prime-rl calls it."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from gtpo.adapters import prime_rl
from tests.adapters.attempts import ATTEMPTS, EXPECTED, assert_close, outcomes_apart


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
