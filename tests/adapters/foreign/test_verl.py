"""The verl adapter with verl itself: loaded by its entry point, called by verl's functions, equal to its own."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage

from gtpo.adapters import verl as adapter
from tests.adapters.attempts import ATTEMPTS, by_the_formula, turn_ids_of

GRPO_TWIN = {"population": "trajectories"}


def test_verl_loads_the_plugin_when_it_is_imported() -> None:
    code = (
        "import verl\n"
        "from verl.trainer.ppo import core_algos as c\n"
        "print(c.get_adv_estimator_fn('gtpo').__module__, c.get_policy_loss_fn('gtpo').__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split()[-2:] == ["gtpo.adapters.verl", "gtpo_policy_loss"]


def batch(seed: int, num_rows: int = 24, width: int = 20) -> DataProto:
    """Ragged rows of several turns; the reward on the last sampled token, which is all that GRPO knows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, width, generator=generator) < 0.6
    mask[:, 0] = True
    last = torch.tensor([int(row.nonzero().max()) for row in mask])
    rewards = torch.zeros(num_rows, width)
    rewards[torch.arange(num_rows), last] = torch.rand(num_rows, generator=generator)
    uids = np.array([f"task {i % 5}" for i in range(num_rows)], dtype=object)
    return DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask.long()}, non_tensors={"uid": uids}
    )


@pytest.mark.parametrize("seed", range(20))
def test_with_grpos_options_it_gives_verls_grpo(seed: int) -> None:
    config = OmegaConf.create({"gamma": 1.0, "gtpo": GRPO_TWIN})
    ours = compute_advantage(batch(seed), adv_estimator="gtpo", config=config).batch["advantages"]
    theirs = compute_advantage(batch(seed), adv_estimator=core_algos.AdvantageEstimator.GRPO).batch["advantages"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("ours", "verls", "dual_clip"),
    [
        ("gtpo", "vanilla", 1.4),
        ("gtpo_sequence", "gspo", 1e6),
        ("gtpo_cispo", "cispo", 1e6),
        ("gtpo_reinforce", "gpg", 1e6),
    ],
)
def test_the_loss_is_verls(
    monkeypatch: pytest.MonkeyPatch, mode: str, seed: int, ours: str, verls: str, dual_clip: float
) -> None:
    class Config(SimpleNamespace):
        def get(self, name: str, default: object = None) -> Any:
            return getattr(self, name, default)

    generator = torch.Generator().manual_seed(seed)
    old, advantages = torch.randn(2, 6, 11, generator=generator)
    new = old + 0.6 * torch.randn(old.shape, generator=generator)
    mask = torch.rand(old.shape, generator=generator) < 0.7
    mask[3] = False
    info = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 12, "loss_scale_factor": 5} if seed % 2 else {}
    config = Config(
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, clip_ratio_c=dual_clip, global_batch_info=info
    )
    monkeypatch.setattr(core_algos, "ActorConfig", Config)  # which it asks for by type
    results = []
    for name in (ours, verls):
        leaf = new.clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=leaf,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=torch.rand(old.shape, generator=torch.Generator().manual_seed(9)),
        )
        loss -= 0.01 * leaf.sum()
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    (our_loss, our_gradient, our_metrics), (their_loss, their_gradient, their_metrics) = results
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)
    if ours == "gtpo":  # the others report none, or of another ratio
        assert our_metrics == pytest.approx(their_metrics, abs=1e-5)
        assert our_metrics["actor/pg_clipfrac_lower"] > 0


def agent_output(turn_ids: list[int], **fields: Any) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=[1, 2],
        response_ids=list(range(len(turn_ids))),
        response_mask=[int(turn >= 0) for turn in turn_ids],
        metrics=AgentLoopMetrics(),
        **fields,
    )


def test_turn_rewards_travel_from_the_agent_loop_to_the_advantages() -> None:
    """What `AgentLoopWorkerTQ` does with an output: `as_dict`, then padded to a batch, then `compute_advantage`."""
    rows = turn_ids_of(ATTEMPTS)
    scores = []
    for turn_ids, rewards in zip(rows, ATTEMPTS.rewards, strict=True):
        output = adapter.with_turn_rewards(agent_output(turn_ids), [*rewards[:-1], rewards[-1] - 1.0])
        assert isinstance(output, AgentLoopOutput)
        output.reward_score = 1.0  # as the reward loop sets it afterwards
        fields = output.as_dict()
        assert "turn_rewards" not in fields
        scores.append(fields["rm_scores"])
    padded = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor([int(t >= 0) for t in row]) for row in rows], batch_first=True)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": padded, "response_mask": mask},
        non_tensors={"uid": np.array(ATTEMPTS.groups, dtype=object)},
    )
    config = OmegaConf.create({"gamma": 0.9})
    advantages: Tensor = compute_advantage(data, adv_estimator="gtpo", config=config).batch["advantages"]
    expected = by_the_formula(ATTEMPTS.rewards, ATTEMPTS.groups)
    for row, (turn_ids, values) in enumerate(zip(rows, expected, strict=True)):
        by_token = [0.0 if turn < 0 else values[turn] for turn in turn_ids]
        assert advantages[row, : len(by_token)].tolist() == pytest.approx(by_token, rel=1e-4, abs=1e-6)
        assert not advantages[row, len(by_token) :].any()


def test_only_fields_that_were_set_are_sent_on() -> None:
    output = adapter.with_turn_rewards(agent_output([0, 0, -1, 1], extra_fields={"turn_scores": [1]}), [0.5, 0.25])
    fields = output.as_dict()
    assert fields["rm_scores"].tolist() == [0.0, 0.5, 0.0, 0.25]
    assert fields["extra_fields"] == {"turn_scores": [1]}
    assert fields.keys() == {*agent_output([0]).as_dict(), "rm_scores"}
    with pytest.raises(ValueError, match="each of the 2 turns in response_mask, got 1"):
        adapter.with_turn_rewards(agent_output([0, -1, 1]), [1.0])


def test_an_agent_loop_may_return_it() -> None:
    class Loop:
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
            return adapter.with_turn_rewards(agent_output([0]), [1.0])

    assert asyncio.run(Loop().run({})).num_turns == 0
