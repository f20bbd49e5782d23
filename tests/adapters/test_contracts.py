"""Adapters to trainers that are not installed here: called as the trainers call them, with objects of the same form.

The calls and attributes are those of the published sources named at each test.  `foreign/` repeats what it can with the
trainers themselves.
"""

import asyncio
import inspect
import sys
from collections.abc import Iterable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gtpo.adapters import areal, nemo_rl, openrlhf, prime_rl, rllm, skyrl, slime, tinker_cookbook, verl
from gtpo.adapters.layouts import list_turn_advantages
from gtpo_kernels import clipped_loss
from tests.adapters.conftest import ATTEMPTS, by_the_formula, turn_ids_of

EXPECTED = by_the_formula(ATTEMPTS.rewards, ATTEMPTS.groups)
TURN_IDS = turn_ids_of(ATTEMPTS)
BY_TOKEN = [
    [0.0 if turn < 0 else values[turn] for turn in turns] for values, turns in zip(EXPECTED, TURN_IDS, strict=True)
]


def padded(rows: Iterable[Iterable[float]], width: int = 12) -> Tensor:
    return torch.tensor([[*row, *[0.0] * width][:width] for row in rows])


MASK = padded([[float(turn >= 0) for turn in turns] for turns in TURN_IDS])


def token_rewards() -> Tensor:
    rewards = torch.zeros(MASK.shape)
    for row, (values, turns) in enumerate(zip(ATTEMPTS.rewards, TURN_IDS, strict=True)):
        for turn, reward in enumerate(values):
            rewards[row, max(t for t, of in enumerate(turns) if of == turn)] = reward
    return rewards


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def outcomes_apart() -> tuple[list[list[float]], list[float]]:
    """The same rewards as turn rewards and one number for each trajectory, which is paid on its last turn."""
    return [[*row[:-1], row[-1] - 1.0] for row in ATTEMPTS.rewards], [1.0] * len(ATTEMPTS.rewards)


# (function, keywords of the call in the trainer's source, where that is)
CALLS = {
    "verl estimator": (
        verl.gtpo_advantages,
        ("token_level_rewards", "response_mask", "config", "index"),
        "verl 0.9.1, verl/trainer/ppo/ray_trainer.py, compute_advantage",
    ),
    "verl loss": (
        verl.gtpo_policy_loss,
        (
            *("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"),
            "rollout_is_weights",
        ),
        "verl 0.9.1, verl/workers/utils/losses.py, ppo_loss",
    ),
    "skyrl estimator": (
        skyrl.gtpo_advantages,
        ("token_level_rewards", "response_mask", "index", "values", "grpo_norm_by_std", "gamma", "lambd", "config"),
        "skyrl 0.3.0, skyrl/backends/skyrl_train/utils/ppo_utils.py, compute_advantages_and_returns",
    ),
    "skyrl loss": (
        skyrl.gtpo_policy_loss,
        ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"),
        "skyrl 0.3.0, the same file, ppo_policy_loss",
    ),
    "nemo-rl estimator": (
        nemo_rl.GTPOAdvantageEstimator().compute_advantage,
        ("prompt_ids", "rewards", "mask", "repeated_batch", "logprobs_policy", "logprobs_reference", "valid_mask"),
        "NVIDIA-NeMo/RL 00925dd, nemo_rl/algorithms/advantage_estimator.py",
    ),
    "rllm estimator": (
        rllm.gtpo_advantages,
        ("rewards", "algorithm_config", "traj_groups"),
        "rllm-org/rllm 18c8622, rllm/trainer/algorithms/advantage.py",
    ),
    "slime rewards": (
        slime.reward_post_process,
        ("args", "samples"),
        "THUDM/slime, slime/ray/rollout.py, _post_process_rewards",
    ),
    "slime advantages": (
        slime.compute_advantages,
        ("args", "rollout_data"),
        "THUDM/slime, slime/backends/megatron_utils/loss.py, compute_advantages_and_returns",
    ),
    "prime-rl loss": (prime_rl.gtpo_loss, ("inputs",), "PrimeIntellect-ai/prime-rl, docs, custom losses"),
    "areal workflow": (
        areal.GroupTurnCreditWorkflow(None, 2).arun_episode,
        ("engine", "data"),
        "areal 1.0.4, areal/api/workflow_api.py",
    ),
    "tinker-cookbook data": (
        tinker_cookbook.assemble_training_data,
        ("trajectory_groups_P", "advantages_P", "include_provenance"),
        "tinker-cookbook 0.6.1, tinker_cookbook/rl/data_processing.py",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_trainers_call_fits(name: str) -> None:
    function, keywords, _ = CALLS[name]
    inspect.signature(function).bind(**dict.fromkeys(keywords))


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


def test_verl_loss_refuses_what_it_cannot_divide_by() -> None:
    rows = torch.zeros(1, 2)
    config = ActorConfig(clip_ratio=0.2, global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="batch_num_tokens of the whole batch is needed with dp_size=2"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "token-mean", config)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of verl's, got 'mean'"):
        verl.gtpo_policy_loss(rows, rows, rows, rows.bool(), "mean", config)


class SkyRLTrainer:
    """As `RayPPOTrainer.compute_advantages_and_returns`: passes `response_mask`, which covers tool output."""

    def compute_advantages_and_returns(self, data: dict[str, Any]) -> dict[str, Any]:
        data["advantages"], data["returns"] = skyrl.gtpo_advantages(
            token_level_rewards=data["rewards"],
            response_mask=data["response_mask"],
            index=data["uids"],
            values=None,
            grpo_norm_by_std=True,
            gamma=0.9,
            lambd=1.0,
            config=None,
        )
        return data


def test_skyrl_trainer_shows_the_turns() -> None:
    lengths = torch.tensor([len(turns) for turns in TURN_IDS])
    response_mask = (torch.arange(MASK.shape[1]) < lengths[:, None]).float()
    data = {"rewards": token_rewards(), "response_mask": response_mask, "loss_mask": MASK, "uids": ATTEMPTS.groups}
    with pytest.raises(RuntimeError, match="hides the turns"):
        SkyRLTrainer().compute_advantages_and_returns(dict(data))
    found = skyrl.trainer_class(SkyRLTrainer)().compute_advantages_and_returns(data)
    assert_close(found["advantages"], padded(BY_TOKEN))
    assert found["response_mask"] is response_mask


def test_skyrl_loss_is_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, *MASK.shape, generator=generator)
    scaled = advantages / MASK.sum()
    config = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.28, off_policy_correction=None)
    loss, metrics = skyrl.gtpo_policy_loss(new, old, scaled, config, loss_mask=MASK)
    expected = clipped_loss(
        new.flatten(), advantages.flatten(), loss_mask=MASK.bool().flatten(), old_logprobs=old.flatten()
    )
    assert_close(loss, expected.loss)
    assert 0.0 < metrics["clip_ratio"] < 1.0
    config.off_policy_correction = SimpleNamespace(tis_ratio_type="token")
    with pytest.raises(ValueError, match="no off-policy correction, got tis_ratio_type"):
        skyrl.gtpo_policy_loss(new, old, scaled, config)


def test_nemo_rl() -> None:
    turn_rewards, outcomes = outcomes_apart()
    prompts = torch.tensor([[1, 2, group == "a"] for group in ATTEMPTS.groups])
    estimator = nemo_rl.GTPOAdvantageEstimator({"name": "gtpo", "gtpo": {"gamma": 0.9}}, None)
    batch = {"turn_rewards": turn_rewards}
    found = estimator.compute_advantage(prompts, torch.tensor(outcomes), MASK, batch, logprobs_policy=None)
    assert_close(found, padded(BY_TOKEN))
    batch["turn_rewards"][1] = [0.0, 0.0]
    with pytest.raises(ValueError, match="row 1 has 1 turns, got 2 rewards"):
        estimator.compute_advantage(prompts, torch.tensor(outcomes), MASK, batch)


def test_nemo_rl_masked_sample_leaves_the_statistics() -> None:
    mask = torch.tensor([[0, 1], [0, 1], [0, 0]])
    found = nemo_rl.GTPOAdvantageEstimator().compute_advantage(torch.zeros(3), torch.tensor([1.0, 0.0, 9.0]), mask)
    assert_close(found[:, 1], torch.tensor([0.70710, -0.70710, 0.0]))


def test_rllm_writes_the_steps() -> None:
    groups, rewards = [], []
    for label in ("a", "b"):
        rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == label]
        trajectories = [
            SimpleNamespace(
                steps=[
                    SimpleNamespace(reward=reward, response_ids=[0] * tokens, advantage=None)
                    for reward, tokens in zip(ATTEMPTS.rewards[i], ATTEMPTS.num_tokens[i], strict=True)
                ]
            )
            for i in rows
        ]
        groups.append((rows, SimpleNamespace(trajectories=trajectories)))
        rewards.append(np.array([sum(ATTEMPTS.rewards[i]) for i in rows]))
    config = SimpleNamespace(estimator="gtpo")
    advantages, returns = rllm.gtpo_advantages(
        rewards=rewards, algorithm_config=config, traj_groups=[g for _, g in groups]
    )
    assert [len(row) for row in advantages] == [len(row) for row in returns] == [3, 3]
    for rows, group in groups:
        for i, trajectory in zip(rows, group.trajectories, strict=True):
            for j, step in enumerate(trajectory.steps):
                assert step.advantage == pytest.approx([EXPECTED[i][j]] * ATTEMPTS.num_tokens[i][j], rel=1e-5)
    assert rllm.gtpo_advantages.writes_step_advantages  # type: ignore[attr-defined]


def test_rllm_pays_an_outcome_on_the_last_step() -> None:
    steps = [SimpleNamespace(reward=0.0, response_ids=[0], advantage=None) for _ in range(3)]
    group = SimpleNamespace(trajectories=[SimpleNamespace(steps=steps[:2]), SimpleNamespace(steps=steps[2:])])
    rllm.gtpo_advantages([np.array([1.0, 0.0])], SimpleNamespace(gtpo={"gamma": 0.5}), traj_groups=[group])
    expected = by_the_formula([[0.0, 1.0], [0.0]], "aa", gamma=0.5)
    assert [step.advantage[0] for step in steps] == pytest.approx([*expected[0], *expected[1]], rel=1e-5)


def slime_samples() -> list[Any]:
    turn_rewards, outcomes = outcomes_apart()
    return [
        SimpleNamespace(
            group_index=ATTEMPTS.groups[i],
            loss_mask=[int(turn >= 0) for turn in turns],
            response_length=len(turns),
            metadata={"turn_rewards": turn_rewards[i]},
            get_reward_value=lambda args, i=i: outcomes[i],
        )
        for i, turns in enumerate(TURN_IDS)
    ]


def test_slime_from_samples_to_tokens() -> None:
    """The global view makes the credit, a data-parallel rank spreads it over its own tokens."""
    samples = slime_samples()
    raw, rewards = slime.reward_post_process(SimpleNamespace(), samples)
    assert raw == [1.0] * 6
    ours = [3, 0, 4]
    data = {
        "rewards": [rewards[i] for i in ours],
        "loss_masks": [torch.tensor(samples[i].loss_mask) for i in ours],
        "log_probs": [torch.zeros(samples[i].response_length) for i in ours],
    }
    slime.compute_advantages(SimpleNamespace(), data)
    for i, advantages, returns in zip(ours, data["advantages"], data["returns"], strict=True):
        assert advantages.tolist() == pytest.approx(BY_TOKEN[i], rel=1e-5)
        assert torch.equal(advantages, returns)
    assert all(isinstance(reward, float) for reward in data["rewards"])


def test_slime_refusals() -> None:
    samples = slime_samples()
    samples[0].metadata["turn_rewards"] = [1.0]
    with pytest.raises(ValueError, match="sample 0 has 3 turns in its loss mask, got 1 rewards"):
        slime.reward_post_process(SimpleNamespace(), samples)
    data = {"rewards": [1.0], "loss_masks": [torch.ones(2)]}
    with pytest.raises(ValueError, match="pass it as --custom-reward-post-process-path"):
        slime.compute_advantages(SimpleNamespace(), data)
    data = {"rewards": [torch.ones(1)], "loss_masks": [torch.ones(4)], "log_probs": [torch.zeros(2)]}
    with pytest.raises(ValueError, match="context parallelism is not supported"):
        slime.compute_advantages(SimpleNamespace(), data)


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


def test_areal_workflow_credits_its_group() -> None:
    rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == "b"]
    todo = iter([*rows, None])

    class Episodes:
        async def arun_episode(self, engine: object, data: dict[str, Any]) -> dict[str, Any] | None:
            i = next(todo)
            if i is None:  # rejected
                return None
            return {
                f"{i}-{j}": SimpleNamespace(reward=reward, model_response=SimpleNamespace(output_tokens=[0] * tokens))
                for j, (reward, tokens) in enumerate(zip(ATTEMPTS.rewards[i], ATTEMPTS.num_tokens[i], strict=True))
            }

    found = asyncio.run(areal.GroupTurnCreditWorkflow(Episodes(), 4, gamma=0.9).arun_episode(None, {}))
    assert found is not None
    for i in rows:
        assert [found[f"{i}-{j}"].reward for j in range(len(EXPECTED[i]))] == pytest.approx(EXPECTED[i], rel=1e-5)
    with pytest.raises(ValueError, match="'x' is in two trajectories"):
        areal.set_turn_advantages([{"x": None}, {"x": None}])
    with pytest.raises(ValueError, match="'input_ids' is a Tensor"):
        areal.set_turn_advantages([{"input_ids": torch.zeros(1)}])


def test_tinker_cookbook_advantages_of_transitions() -> None:
    groups = []
    for label in ("a", "b"):
        rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == label]
        trajectories = [
            SimpleNamespace(
                transitions=[
                    SimpleNamespace(reward=reward, ac=SimpleNamespace(tokens=[0] * tokens))
                    for reward, tokens in zip(outcomes_apart()[0][i], ATTEMPTS.num_tokens[i], strict=True)
                ]
            )
            for i in rows
        ]
        groups.append(SimpleNamespace(trajectories_G=trajectories, final_rewards_G=[1.0] * len(rows)))
    found = [row.tolist() for group in tinker_cookbook.compute_advantages(groups, gamma=0.9) for row in group]
    order = sorted(range(6), key=lambda i: ATTEMPTS.groups[i])
    for i, row in zip(order, found, strict=True):
        assert row == pytest.approx(EXPECTED[i], rel=1e-5)


def openrlhf_experiences(with_turn_rewards: bool = True) -> list[Any]:
    """In another order than the prompts, and with different widths."""
    order = sorted(range(6), key=lambda i: ATTEMPTS.groups[i])  # place in the order of prompts -> row of ATTEMPTS
    experiences = []
    for places in ([4, 0], [1, 5, 3, 2]):
        rows = [order[place] for place in places]
        logs = [openrlhf.turn_reward_logs(ATTEMPTS.rewards[i], max_turns=5) for i in rows]
        experiences.append(
            SimpleNamespace(
                index=places,
                rows=rows,
                action_mask=padded(
                    [[float(t >= 0) for t in TURN_IDS[i]] for i in rows], max(len(TURN_IDS[i]) for i in rows)
                ),
                rewards=torch.tensor([sum(ATTEMPTS.rewards[i]) for i in rows]),
                info={k: torch.tensor([log[k] for log in logs]) for k in logs[0]} if with_turn_rewards else {},
                kl=None,
            )
        )
    return experiences


def test_openrlhf_experience_maker() -> None:
    class RemoteExperienceMaker:
        kl_ctl = SimpleNamespace(value=0.1)
        strategy = SimpleNamespace(args=SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=3)))

        def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
            for experience in experiences:
                experience.info["return"] = experience.rewards
            return experiences

    maker = openrlhf.experience_maker_class(RemoteExperienceMaker, gamma=0.9)()
    for experience in maker.compute_advantages_and_returns(openrlhf_experiences()):
        assert "return" in experience.info
        assert_close(
            experience.advantages, padded([BY_TOKEN[i] for i in experience.rows], experience.action_mask.shape[1])
        )
        assert experience.returns.shape == experience.action_mask.shape
    penalised = openrlhf_experiences()
    penalised[0].kl = torch.ones(2, 3)
    with pytest.raises(ValueError, match="a KL penalty in the reward is not supported"):
        maker.compute_advantages_and_returns(penalised)


def test_openrlhf_outcome_alone_lies_on_the_last_turn() -> None:
    experiences = openrlhf_experiences(with_turn_rewards=False)
    openrlhf.set_turn_advantages(experiences, 3)
    rewards = [[0.0] * (len(row) - 1) + [sum(row)] for row in ATTEMPTS.rewards]
    expected = list_turn_advantages(rewards, ATTEMPTS.groups)
    for experience in experiences:
        for row, i in enumerate(experience.rows):
            values = experience.advantages[row][experience.action_mask[row].bool()]
            assert values.tolist() == pytest.approx(np.repeat(expected[i], ATTEMPTS.num_tokens[i]).tolist(), rel=1e-5)


def test_openrlhf_refusals() -> None:
    experiences = openrlhf_experiences()
    for experience in experiences:
        experience.info = {"turn_reward_0": experience.rewards}
    with pytest.raises(ValueError, match=r"a row has \d turns, got 1"):
        openrlhf.set_turn_advantages(experiences, 3)
    with pytest.raises(ValueError, match="group_size=2 trajectories, but"):
        openrlhf.set_turn_advantages(openrlhf_experiences()[:1], 2)
    with pytest.raises(ValueError, match="at most max_turns=1 rewards, got 2"):
        openrlhf.turn_reward_logs([0.0, 1.0], max_turns=1)
