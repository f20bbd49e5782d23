"""AReaL: a workflow that plays a whole group and puts turn advantages where the rewards of interactions were.

AReaL trains on interactions (one model response each, a turn here) that its OpenAI-compatible client exports, and
computes advantages from their rewards.  With `actor.reward_norm=null`, `actor.adv_norm=null`, `actor.gae_lambda=1`,
`actor.discount=1`, `actor.kl_ctl=0`, `actor.reward_scaling=1`, `actor.reward_bias=0`, a `reward_clip` above any
advantage, and interactions exported in the style "individual" without a turn discount, what stands in `reward` is the
advantage of every token of the interaction.  Written against AReaL 1.0.4.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from gtpo.adapters.layouts import list_turn_advantages
from gtpo.adapters.options import credit_settings


class GroupTurnCreditWorkflow:
    """A `RolloutWorkflow` that runs `workflow` `group_size` times on one task and credits the turns of the group.

    workflow: its `arun_episode` returns interactions by id, in the order of turns, or None for a rejected trajectory.
    group_size: AReaL's own group size must then be 1, or it would make groups of groups.
    options: those of `gtpo.adapters.layouts`.
    Source: the signature of `arun_episode` is that of `RolloutWorkflow` in areal/api/workflow_api.py.
    """

    def __init__(self, workflow: Any, group_size: int, **options: Any) -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2 to compare attempts, got {group_size}")
        credit_settings(options, given=())
        self.workflow, self.group_size, self.options = workflow, group_size, options

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any] | None:
        episodes = [self.workflow.arun_episode(engine, data) for _ in range(self.group_size)]
        accepted = [interactions for interactions in await asyncio.gather(*episodes) if interactions]
        return set_turn_advantages(accepted, **self.options) if accepted else None


def set_turn_advantages(group: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
    """Put the advantage of each turn where its reward was, and merge the trajectories of the group.

    group: for each trajectory of one task its interactions by id, in the order of turns, as AReaL's client exports
        them; `interaction.reward` is the turn's own reward (None: 0), `interaction.model_response.output_tokens` its
        tokens.
    options: those of `gtpo.adapters.layouts`.
    Raises ValueError for an id that two trajectories share, and for tensors in the place of interactions.
    Source: arXiv 2511.14846; `InteractionWithTokenLogpReward` in areal/experimental/openai/types.py.
    """
    merged: dict[str, Any] = {}
    for interactions in group:
        shared = merged.keys() & interactions.keys()
        if shared:
            raise ValueError(f"group must have interactions of different ids, {min(shared)!r} is in two trajectories")
        merged.update(interactions)
    wrong = next((key for key, value in merged.items() if not hasattr(value, "model_response")), None)
    if wrong is not None:
        raise ValueError(f"group must hold interactions by id, {wrong!r} is a {type(merged[wrong]).__name__}")
    rewards = [[float(turn.reward or 0.0) for turn in interactions.values()] for interactions in group]
    tokens = [[len(turn.model_response.output_tokens) for turn in interactions.values()] for interactions in group]
    advantages = list_turn_advantages(rewards, [0] * len(group), num_tokens=tokens, **options)
    for interactions, row in zip(group, advantages, strict=True):
        for turn, advantage in zip(interactions.values(), row, strict=True):
            turn.reward = advantage
    return merged
