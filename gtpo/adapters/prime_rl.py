"""prime-rl: turn-level credit for a group of traces, and a loss for its `[trainer.loss]`.

    [trainer.loss]
    type = "custom"
    import_path = "gtpo.adapters.prime_rl.gtpo_loss"

prime-rl has no setting that names an algorithm of one's own: subclass its `Algorithm` and let `score_group` call
`assign_turn_advantages` (docs/adapters/prime_rl.md).  Turn rewards are what the environment puts into
`trace.info["turn_rewards"]`, one float for each turn; the trace's own reward is paid on the last.
"""

from collections.abc import Callable, Sequence
from typing import Any

from gtpo.adapters.layouts import list_turn_advantages
from gtpo_kernels import clipped_loss


def assign_turn_advantages(
    traces: Sequence[Any], assign_advantages: Callable[[Any, list[float]], object], **options: Any
) -> None:
    """Assign each trace of one group a list of advantages aligned to its sampled tokens.

    traces: the group's `vf.Trace`s, from prime-rl's `iter_trainable_traces(episodes)`; nodes with any `mask` are turns.
    assign_advantages: prime-rl's function of that name.
    options: those of `gtpo.adapters.layouts`.
    Raises ValueError for another number of turn rewards than of turns.
    Source: arXiv 2511.14846; `Algorithm.score_group` and `assign_advantages` in src/prime_rl/orchestrator/algo.
    """
    tokens = [[sum(node.mask) for node in trace.nodes if any(node.mask)] for trace in traces]
    rewards = []
    for place, (trace, counts) in enumerate(zip(traces, tokens, strict=True)):
        turns = [float(reward) for reward in trace.info.get("turn_rewards", [0.0] * len(counts))]
        if len(turns) != len(counts):
            raise ValueError(
                f"info['turn_rewards'] must have one reward for each turn: trace {place} has {len(counts)} turns, "
                f"got {len(turns)} rewards"
            )
        if turns:
            turns[-1] += float(trace.reward)
        rewards.append(turns)
    advantages = list_turn_advantages(rewards, [0] * len(traces), num_tokens=tokens, **options)
    for trace, row, counts in zip(traces, advantages, tokens, strict=True):
        assign_advantages(trace, [value for value, count in zip(row, counts, strict=True) for _ in range(count)])


def gtpo_loss(inputs: Any, clip_low: float = 0.2, clip_high: float = 0.28, **kwargs: Any) -> Any:
    """prime-rl's custom loss: `clipped_loss` of one sequence, summed over its tokens, as prime-rl divides it later.

    inputs: prime-rl's `LossInputs`, [seq] each.  inference_logprobs take the place of the old policy's.
    Returns prime-rl's `LossOutputs`.
    Raises ValueError for keywords that this loss does not know.
    Source: arXiv 2511.14846; the signature is that of prime-rl's documentation of custom losses.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if kwargs:
        raise ValueError(f"[trainer.loss.kwargs] may hold clip_low and clip_high, got {', '.join(kwargs)}")
    weights = getattr(inputs, "loss_weights", None)
    result = clipped_loss(
        inputs.trainer_logprobs,
        inputs.advantages if weights is None else inputs.advantages * weights,
        loss_mask=inputs.loss_mask,
        old_logprobs=inputs.inference_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        num_loss_tokens=1.0,
        metrics="all",
    )
    seen = result.metrics
    metrics = {
        "clip_low": seen.clip_low_fraction,
        "clip_high": seen.clip_high_fraction,
        "mismatch_kl": seen.approx_kl_k3,
    }
    return LossOutputs(loss=result.loss, metrics=metrics)
