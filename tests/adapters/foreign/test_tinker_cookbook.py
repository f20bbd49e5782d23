"""Training data of tinker-cookbook itself, with our advantages in it."""

import pytest
import tinker
import torch
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl import data_processing
from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY, Trajectory, TrajectoryGroup, Transition

from gtpo.adapters import tinker_cookbook as adapter
from tests.adapters.attempts import ATTEMPTS, by_the_formula, turn_ids_of

PROMPT = [100, 101]


def trajectory(row: int, masked: int | None = None) -> Trajectory:
    tokens, transitions = list(PROMPT), []
    next_id = 0
    for turn, (sampled, inserted) in enumerate(
        zip(ATTEMPTS.num_tokens[row], ATTEMPTS.num_tool_tokens[row], strict=True)
    ):
        action = list(range(next_id, next_id + sampled))
        transitions.append(
            Transition(
                ob=tinker.ModelInput.from_ints(list(tokens)),
                ac=TokensWithLogprobs(tokens=action, maybe_logprobs=[-1.0] * sampled),
                reward=ATTEMPTS.rewards[row][turn],
                episode_done=False,
                metrics={PARSE_ERROR_MASKED_METRIC_KEY: 1.0} if turn == masked else {},
            )
        )
        tokens += action + [200] * inserted
        next_id += sampled
    return Trajectory(transitions=transitions, final_ob=tinker.ModelInput.empty())


def test_every_trained_token_has_the_advantage_of_its_turn() -> None:
    rows = [i for i, group in enumerate(ATTEMPTS.groups) if group == "a"]
    group = TrajectoryGroup([trajectory(i) for i in rows], [0.0] * len(rows), [{} for _ in rows])
    data, metadata = adapter.assemble_training_data([group], adapter.compute_advantages([group]))
    theirs, their_metadata = data_processing.assemble_training_data([group], [torch.ones(len(rows))])
    assert metadata == their_metadata
    expected = by_the_formula([ATTEMPTS.rewards[i] for i in rows], "a" * len(rows))
    for datum, other, i, values in zip(data, theirs, rows, expected, strict=True):
        by_token = [0.0] * (len(PROMPT) - 1) + [0.0 if t < 0 else values[t] for t in turn_ids_of(ATTEMPTS)[i]]
        found = datum.loss_fn_inputs["advantages"].to_torch().tolist()
        assert found == pytest.approx(by_token, rel=1e-5)
        for name in ("target_tokens", "mask", "logprobs"):
            assert torch.equal(datum.loss_fn_inputs[name].to_torch(), other.loss_fn_inputs[name].to_torch())


def test_turns_masked_for_a_parse_error_stay_masked() -> None:
    (datum,) = adapter.trajectory_to_data(trajectory(0, masked=1), [1.0, 2.0, 3.0])
    values = datum.loss_fn_inputs["advantages"].to_torch()
    assert values.unique().tolist() == [0.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="one number for each of 3 transitions, got 1"):
        adapter.trajectory_to_data(trajectory(0), [1.0])
