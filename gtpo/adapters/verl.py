"""verl: the advantage estimator `gtpo`, the policy loss `gtpo`, and agent-loop outputs that carry turn rewards.

verl loads this module in each of its processes by the entry point `verl.plugins`, or where
`VERL_USE_EXTERNAL_MODULES=gtpo.adapters.verl` is set.  Then `algorithm.adv_estimator=gtpo` and
`actor_rollout_ref.actor.policy_loss.loss_mode=gtpo` (or another of `LOSS_MODES`) name what is here.
Written against verl 0.9.1.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gtpo.adapters.layouts import token_reward_advantages, turn_ids_of_runs
from gtpo.adapters.options import credit_settings, with_discount
from gtpo_kernels import LossRule, clipped_loss
from gtpo_kernels.clipped_loss.reference import Surrogate

NAME = "gtpo"


def gtpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """verl's `adv_estimator=gtpo`: `token_reward_advantages`, where each run of sampled tokens is a turn.

    token_level_rewards, response_mask: [bs, response_length].  index: the uid of each row's prompt.
    config: verl's `algorithm`.  `algorithm.gamma` is the discount from turn to turn (verl: 1.0, GTPO: 0.9); any option
        of `gtpo.adapters.layouts` can stand under `+algorithm.gtpo.<keyword>=<value>`.  With `+algorithm.gtpo.method`
        discounts are the preset's, or those of `+algorithm.gtpo.terms.0.gamma`.
    Returns (advantages, returns), [bs, response_length] each.
    Raises ValueError for a rejection by verl's rollout correction (`rollout_rs` outside bypass mode), which takes
        tokens out of the mask, and with them turns; and for credits that need more than verl hands over.
    Source: arXiv 2511.14846; the signature is that of `verl.trainer.ppo.core_algos.register_adv_est`.

    >>> rewards, mask = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    >>> advantages, returns = gtpo_advantages(rewards, mask, index=["a", "a"], config={"gamma": 0.5})
    >>> returns.tolist()
    [[0.5, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if index is None:
        raise ValueError("index must hold the uid of each row's prompt, got None: verl's batch had no 'uid'")
    credit = token_reward_advantages(token_level_rewards, response_mask, index, **_credit_options(config))
    dtype = token_level_rewards.dtype
    return credit.advantages.to(dtype), credit.returns.to(dtype)


def _credit_options(config: Any) -> dict[str, Any]:
    """What verl's `algorithm` says about the credit."""
    if config is None:
        return {}
    options = with_discount(config.get(NAME, None) or {}, config.get("gamma", None), key="algorithm.gamma")
    credit_settings(options, given=())
    correction = config.get("rollout_correction", None) or {}
    if correction.get("rollout_rs", None) and not correction.get("bypass_mode", False):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs={correction.get('rollout_rs')!r} cuts tokens out of "
            "response_mask before advantages are made, so that turns cannot be told from it: use rollout_is, or "
            "bypass_mode"
        )
    return options


def gtpo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    ratio_level: Literal["token", "turn", "sequence"] = "token",
    surrogate: Surrogate = "ppo",
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `loss_mode=gtpo`: `clipped_loss`, with every `loss_agg_mode` of verl's `agg_loss`.

    config: verl's actor config; `clip_ratio_low`, `clip_ratio_high` (without them `clip_ratio`), `clip_ratio_c` (the
        dual clip of surrogate "ppo"; verl's default is 3), and `global_batch_info`, the denominators over micro-batches
        and ranks.
    rollout_is_weights: [bs, response_length] not negative, verl's rollout correction.
    ratio_level, surrogate: those of the loss mode, see `LOSS_MODES`.  A turn is a run of 1s in response_mask.
    Returns (loss, metrics under verl's names).
    Raises ValueError for an unknown `loss_agg_mode`, or where dp_size > 1 comes without the global counts.
    Source: arXiv 2511.14846; the signature is that of `verl.trainer.ppo.core_algos.register_policy_loss`.
    """
    if config is None:
        raise ValueError("config must be verl's actor config, got None")
    mask = response_mask.bool()
    weights, denominator = _aggregation(mask, loss_agg_mode, **config.global_batch_info)
    weighted = advantages * weights if rollout_is_weights is None else advantages * weights * rollout_is_weights
    low, high, dual = (config.get(name, None) for name in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"))
    ratio_ids = None
    if ratio_level != "token":
        rows = torch.arange(len(mask), device=mask.device)[:, None] * (mask.shape[1] + 1)
        ratio_ids = (rows + (turn_ids_of_runs(mask).clamp(min=0) if ratio_level == "turn" else 0)).expand(mask.shape)
    result = clipped_loss(
        log_prob.reshape(-1),
        weighted.to(log_prob.dtype).reshape(-1),
        loss_mask=mask.reshape(-1),
        old_logprobs=old_log_prob.reshape(-1),
        clip_low=float(config.clip_ratio if low is None else low),
        clip_high=float(config.clip_ratio if high is None else high),
        rule=LossRule(surrogate, dual_clip=float(dual) if dual is not None and surrogate == "ppo" else None),
        ratio_ids=None if ratio_ids is None else ratio_ids.reshape(-1),
        num_loss_tokens=denominator,
        metrics="all",
    )
    seen = result.metrics
    metrics = {
        "actor/pg_clipfrac": (seen.clip_low_fraction + seen.clip_high_fraction).item(),
        "actor/ppo_kl": seen.approx_kl_k1.item(),
        "actor/pg_clipfrac_lower": 0.0 if seen.clip_dual_fraction is None else seen.clip_dual_fraction.item(),
    }
    # verl adds its entropy and KL terms to the loss in place
    return result.loss.clone(), metrics


LOSS_MODES: dict[str, Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    NAME: gtpo_policy_loss,
    "gtpo_turn": functools.partial(gtpo_policy_loss, ratio_level="turn"),
    "gtpo_sequence": functools.partial(gtpo_policy_loss, ratio_level="sequence"),
    "gtpo_cispo": functools.partial(gtpo_policy_loss, surrogate="cispo"),
    "gtpo_reinforce": functools.partial(gtpo_policy_loss, surrogate="reinforce"),
}
"""The values of `policy_loss.loss_mode` that are registered; verl's configuration of losses takes no keys of ours."""


def _aggregation(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """([bs, 1] positive weights, denominator) under which a sum over tokens is verl's `agg_loss`.

    A positive weight of a token's clipped loss is one of its advantage, so that all modes are one sum.
    """
    tokens = mask.sum(dim=1, keepdim=True).double()
    weights = torch.ones_like(tokens)
    if loss_agg_mode in ("token-mean", "token-sum"):
        count = batch_num_tokens if loss_agg_mode == "token-mean" else 1.0
        missing, local = "batch_num_tokens", tokens.sum()
    elif loss_agg_mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        count, missing, local = global_batch_size, "global_batch_size", (tokens > 0).sum().double()
        if loss_agg_mode == "seq-mean-token-mean":
            weights = 1.0 / (tokens + 1e-8)
        elif loss_agg_mode == "seq-mean-token-sum-norm":
            weights = weights / (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    else:
        raise ValueError(f"loss_agg_mode must be one of verl's, got {loss_agg_mode!r}")
    if count is None and dp_size > 1:
        raise ValueError(f"{missing} of the whole batch is needed with dp_size={dp_size}, got None")
    denominator = local if count is None else torch.as_tensor(count, dtype=torch.float64, device=mask.device)
    return weights.to(torch.float32), denominator / dp_size


def with_turn_rewards(output: Any, turn_rewards: Sequence[float]) -> Any:
    """An agent loop's output with one reward for each of its turns, which lie on the turns' last tokens in `rm_scores`.

    output: verl's `AgentLoopOutput`, as `AgentLoopBase.run` returns it.  Its `reward_score` (of the reward loop, or
        set by the agent loop) still lies on the last token, and adds to the last turn.
    turn_rewards: one float for each run of 1s in `output.response_mask`.
    Raises ValueError for another number of rewards.  For verl's trainer v1, its default, which reads `rm_scores`.
    """
    ends = _run_ends(output.response_mask)
    if len(ends) != len(turn_rewards):
        raise ValueError(
            f"turn_rewards must have one reward for each of the {len(ends)} turns in response_mask, "
            f"got {len(turn_rewards)}"
        )
    # only what was set, which is all that verl sends on
    fields = {name: getattr(output, name) for name in output.model_fields_set | {"extra_fields"}}
    base: Any = type(output)
    return _output_class(base)(**fields, turn_rewards=[float(reward) for reward in turn_rewards])


@functools.cache
def _output_class(base: Any) -> Any:
    """A subclass of verl's output class, made where verl is already imported."""

    def as_dict(self: Any) -> dict[str, Any]:
        output: dict[str, Any] = base.as_dict(self)
        rewards = output.pop("turn_rewards")
        scores = output.get("rm_scores")
        output["rm_scores"] = torch.zeros(len(output["response_mask"])) if scores is None else scores.clone()
        ends = torch.tensor(_run_ends(self.response_mask), dtype=torch.long)
        output["rm_scores"].index_add_(0, ends, torch.tensor(rewards, dtype=torch.float32))
        return output

    names = {"__annotations__": {"turn_rewards": list[float]}, "as_dict": as_dict, "__module__": __name__}
    return type("TurnRewardOutput", (base,), names)


def _run_ends(mask: Sequence[int]) -> list[int]:
    """
    >>> _run_ends([1, 1, 0, 1])
    [1, 3]
    """
    return [place for place, now in enumerate(mask) if now and not (place + 1 < len(mask) and mask[place + 1])]


def register() -> None:
    """Put `gtpo` into verl's registries of estimators and losses.  Doing it again changes nothing."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    register_adv_est(NAME)(gtpo_advantages)
    for name, loss in LOSS_MODES.items():
        register_policy_loss(name)(loss)


# At import, whoever comes first: verl loads its plugins by importing them, once, and does not call anything.
if importlib.util.find_spec("verl") is not None:
    try:
        register()
    except Exception:
        # verl says nothing above the level of debugging when a plugin fails
        logging.getLogger(__name__).exception("gtpo.adapters.verl could not register itself with verl")
        raise
