"""The warm-up: whose tokens it learns, which weights each of its optimizers moves, and that it is repeatable."""

import asyncio

import pytest
import torch

from gtpo.batch import PackedSequence, pack
from gtpo.config import RolloutConfig, SftConfig
from gtpo.environments import make_environment
from gtpo.policy import Policy
from gtpo.sandbox import SandboxPool
from gtpo.sft import (
    accumulate_sft_gradient,
    demonstrate,
    make_optimizers,
    run_sft,
    sft_batch,
    to_demonstration_sequence,
)
from tests.trainer.conftest import make_chat, make_rollout, make_trajectory, make_turn, tiny_policy

DEMONSTRATIONS = [
    to_demonstration_sequence(make_trajectory(make_turn(3, num_tool_tokens=2), make_turn(length)))
    for length in (2, 5, 9)
]


def test_only_the_demonstrators_tokens_are_learned() -> None:
    sequence = to_demonstration_sequence(make_trajectory(make_turn(3, num_tool_tokens=2), make_turn(2)))
    assert sequence.token_ids == [1, 2, 3, 10, 11, 12, 200, 201, 10, 11]
    assert sequence.loss_mask == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("micro_batch_tokens", [4096, 16])
def test_loss_and_gradient_are_the_token_mean_over_all_micro_batches(micro_batch_tokens: int) -> None:
    policy = tiny_policy()
    loss = accumulate_sft_gradient(policy, DEMONSTRATIONS, micro_batch_tokens=micro_batch_tokens)
    got = {name: weight.grad for name, weight in policy.trainable().items()}
    assert all(gradient is not None for gradient in got.values())

    plain = tiny_policy()
    logprobs = [learned_logprobs(plain, sequence) for sequence in DEMONSTRATIONS]
    expected = -torch.cat(logprobs).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in plain.trainable().items():
        torch.testing.assert_close(got[name], weight.grad, msg=lambda text, name=name: f"{name}: {text}")


def learned_logprobs(policy: Policy, sequence: PackedSequence) -> torch.Tensor:
    """Log-probabilities of the learned tokens, one sequence alone, by eager PyTorch."""
    batch = pack([sequence], device=policy.device)
    logits = policy.head(policy.hidden_states(batch))
    return logits.log_softmax(-1)[torch.arange(len(batch.targets)), batch.targets][batch.loss_mask]


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    policy = tiny_policy()
    muon, adamw = make_optimizers(policy, "muon")
    names = {id(weight): name for name, weight in policy.trainable().items()}
    of_muon = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    of_adamw = {names[id(weight)] for group in adamw.param_groups for weight in group["params"]}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert all(".layers." in name and "norm" not in name for name in of_muon)
    assert {name for name in of_adamw if "norm" not in name} == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_warm_up_learns_and_repeats_bit_for_bit(optimizer: str) -> None:
    runs: list[list[float]] = []
    for _ in range(2):
        losses: list[float] = []
        config = SftConfig(steps=12, batch_size=2, learning_rate=1e-2, warmup_steps=2, optimizer=optimizer)  # type: ignore[arg-type]
        run_sft(
            tiny_policy(),
            DEMONSTRATIONS,
            config=config,
            seed=0,
            micro_batch_tokens=64,
            max_grad_norm=1.0,
            on_step=lambda _, loss, losses=losses: losses.append(loss),
        )
        runs.append(losses)
    assert runs[0] == runs[1] and len(runs[0]) == 12
    assert max(runs[0][-3:]) < 0.8 * runs[0][0]


def test_a_batch_is_a_function_of_seed_and_step_without_repeats() -> None:
    first = sft_batch(DEMONSTRATIONS, step=3, batch_size=2, seed=1)
    assert first == sft_batch(DEMONSTRATIONS, step=3, batch_size=2, seed=1)
    assert len({id(sequence) for sequence in first}) == 2
    assert len(sft_batch(DEMONSTRATIONS, step=3, batch_size=9, seed=1)) == 3
    drawn = {tuple(map(id, sft_batch(DEMONSTRATIONS, step=step, batch_size=2, seed=1))) for step in range(20)}
    assert len(drawn) > 1


def test_demonstrations_come_from_the_real_tools() -> None:
    policy, config = tiny_policy(), RolloutConfig(max_trajectory_tokens=4000, max_turns=9)
    environment = make_environment("retry")
    tasks = environment.tasks("train", 4, 0)

    async def run() -> list[float]:
        async with SandboxPool(min_tier="landlock") as sandbox:
            rollout = make_rollout(environment, make_chat(policy, config), sandbox, config)
            played = await demonstrate(rollout, environment.oracle, tasks, seed=0, max_concurrent=2)
            assert [trajectory.task for trajectory in played] == tasks
            assert all(turn.results for trajectory in played for turn in trajectory.turns[:-1])
            return [trajectory.outcome for trajectory in played]

    # nine turns are enough for a blind demonstrator
    assert asyncio.run(run()) == [1.0] * 4
