"""Interactions of AReaL itself."""

from areal.api import ModelResponse
from areal.experimental.openai.types import InteractionWithTokenLogpReward

from gtpo.adapters.areal import set_turn_advantages
from tests.adapters.attempts import ATTEMPTS, by_the_formula


def test_the_tensors_of_an_interaction_carry_its_advantage() -> None:
    rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == "b"]
    group = [
        {
            f"{i}-{j}": InteractionWithTokenLogpReward(
                model_response=ModelResponse(
                    input_tokens=[1, 2],
                    output_tokens=[3] * tokens,
                    output_logprobs=[-1.0] * tokens,
                    output_versions=[0] * tokens,
                ),
                reward=reward,
            )
            for j, (reward, tokens) in enumerate(zip(ATTEMPTS.rewards[i], ATTEMPTS.num_tokens[i], strict=True))
        }
        for i in rows
    ]
    merged = set_turn_advantages(group)
    expected = by_the_formula([ATTEMPTS.rewards[i] for i in rows], "b" * len(rows))
    for i, values in zip(rows, expected, strict=True):
        for j, value in enumerate(values):
            rewards = merged[f"{i}-{j}"].to_tensor_dict()["rewards"]
            assert abs(rewards.item() - value) < 1e-5
