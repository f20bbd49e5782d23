"""NeMo-RL: `GTPOAdvantageEstimator`, with the interface of the classes in nemo_rl/algorithms/advantage_estimator.py.

NeMo-RL chooses its estimator in `_create_advantage_estimator` by a fixed list of names, so the script that starts a run
sets `nemo_rl.algorithms.grpo._create_advantage_estimator = lambda config: GTPOAdvantageEstimator(...)` first.
"""

from typing import Any

import torch
from torch import Tensor

from gtpo.adapters.layouts import padded_turn_advantages, turn_ids_of_runs
from gtpo.adapters.options import credit_settings


class GTPOAdvantageEstimator:
    """Turn-level credit for NeMo-RL.

    estimator_config: a mapping; what stands under "gtpo" are options of `gtpo.adapters.layouts`.
    loss_config: NeMo-RL's, unused.
    Raises ValueError for options that are no credit, or need more than NeMo-RL hands over.
    """

    def __init__(self, estimator_config: Any = None, loss_config: Any = None) -> None:
        self.options = dict((estimator_config or {}).get("gtpo") or {})
        credit_settings(self.options, given=())

    def compute_advantage(
        self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, repeated_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """[B, S] advantages, 0 where `mask` is.

        prompt_ids: [B, P] or [B]; equal rows are one group.  rewards: [B], each paid on the last turn.
        mask: [B, S], 1 for trained tokens; each run of them is a turn.  A row of zeros leaves the statistics.
        repeated_batch: may hold "turn_rewards", one list of floats for each row, which are added turn by turn.
        Raises ValueError for another number of turn rewards than of turns.
        Source: arXiv 2511.14846; the signature is that of `GDPOAdvantageEstimator.compute_advantage`.

        >>> mask = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]])
        >>> advantages = GTPOAdvantageEstimator().compute_advantage(torch.zeros(2, 3), torch.tensor([1.0, 0.0]), mask)
        >>> (advantages[:, 1] > 0).tolist()
        [True, False]
        """
        turn_ids = turn_ids_of_runs(mask)
        num_turns = (turn_ids.max(dim=1).values + 1).tolist()
        given = None if repeated_batch is None else repeated_batch.get("turn_rewards")
        if given is not None and len(given) != len(num_turns):
            raise ValueError(
                f"repeated_batch['turn_rewards'] must have one list for each of {len(num_turns)} rows, got {len(given)}"
            )
        turn_rewards = []
        for row, count in enumerate(num_turns):
            turns = [0.0] * count if given is None else [float(reward) for reward in given[row]]
            if count and len(turns) != count:
                raise ValueError(
                    f"repeated_batch['turn_rewards'] must have one reward for each turn: row {row} has {count} turns, "
                    f"got {len(turns)} rewards"
                )
            if count:
                turns[-1] += float(rewards[row])
            turn_rewards.append(turns if count else [])
        rows = prompt_ids.reshape(len(prompt_ids), -1)
        groups = torch.unique(rows, dim=0, return_inverse=True)[1]
        return padded_turn_advantages(turn_rewards, turn_ids, groups, **self.options).advantages
