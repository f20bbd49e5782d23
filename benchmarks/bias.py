"""`make bias`: the policy gradient that each method expects, on small decision processes with a known one.

From many batches of groups comes the expected update of a method, through its own credit and its own loss, and the
noise of it, beside the gradient of the expected sum of rewards (`benchmarks.bias_processes`). Does the update point
along the gradient, and does it vanish where that does? Tables and plots go into docs/credit.md
(`benchmarks.bias_report`).
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks import bias_report
from benchmarks.bias_findings import (
    BY_SIZE,
    CREDITS,
    GROUP_SIZE,
    GROUP_SIZES,
    GROUPS_A_BATCH,
    QUANTILE_Z,
    RESULTS,
    TURN_PROCESSES,
    Finding,
    Results,
)
from benchmarks.bias_processes import ENDS, PROCESSES, Process, Rollouts, sample
from gtpo.credit import credit_advantages
from gtpo.loss import loss_rule
from gtpo.methods import METHODS, CreditSum, Method, PolicyLoss
from gtpo_kernels import clipped_loss, loss_mean, sequence_ids


def updates(process: Process, method: Method, rollouts: Rollouts, groups_a_batch: int) -> Tensor:
    """[number of batches, D]: the update that each batch asks for: minus the gradient of the method's loss.

    A reference policy of a KL term is the policy itself, as when training begins, or the one that sampled.
    """
    observation = torch.tensor(process.observations)[rollouts.states]
    logit = torch.tensor(process.logits, dtype=torch.float64)[observation].requires_grad_()
    logprobs = log_chance(logit, rollouts.tokens)
    entropy = -sum(log_chance(logit, token).exp() * log_chance(logit, token) for token in (0, 1))
    rule = method.loss
    in_loss, weights = token_weights(rollouts, rule, groups_a_batch)
    sampled = sampled_logprobs(process, rollouts)
    reference = logprobs.detach() if rule.kl_reference == "start" else sampled
    ratio_ids = {"turn": rollouts.turn_ids, "sequence": sequence_ids(rollouts.cu_tokens, len(logit))}
    loss = clipped_loss(
        logprobs,
        advantages(method.credit, rollouts, groups_a_batch),
        loss_mask=in_loss,
        old_logprobs=sampled,
        entropy=entropy if rule.entropy_coef else None,
        clip_low=rule.clip_low,
        clip_high=rule.clip_high,
        rule=loss_rule(rule),
        ref_logprobs=None if rule.kl == "none" else reference,
        token_weights=weights,
        ratio_ids=ratio_ids.get(rule.ratio_level),
        num_loss_tokens=1.0,
    ).loss
    return sum_by_batch(process, rollouts, -torch.autograd.grad(loss, logit)[0], groups_a_batch)


def exact_updates(process: Process, rollouts: Rollouts, groups_a_batch: int) -> Tensor:
    """As `updates`, of the estimator that is unbiased by construction, written out: no credit or loss of ours.

    Sum of rewards, less the mean of the group's others, times how much likelier the trajectory has become.
    """
    observation = torch.tensor(process.observations)[rollouts.states]
    logit = torch.tensor(process.logits, dtype=torch.float64)[observation]
    log_ratio = log_chance(logit, rollouts.tokens) - sampled_logprobs(process, rollouts)
    trajectory = sequence_ids(rollouts.cu_tokens, len(logit))
    zeros = torch.zeros(len(rollouts.outcomes), dtype=torch.float64)
    likelier = zeros.index_add(0, trajectory, log_ratio).exp()
    total = zeros.index_add(0, torch.arange(len(zeros)).repeat_interleave(rollouts.cu_turns.diff()), rollouts.rewards)
    of_group = total.view(-1, rollouts.group_size)
    others = (of_group.sum(dim=1, keepdim=True) - of_group) / (rollouts.group_size - 1)
    score = rollouts.tokens - torch.sigmoid(logit)
    gradients = ((of_group - others).flatten() * likelier)[trajectory] * score
    return sum_by_batch(process, rollouts, gradients / (groups_a_batch * rollouts.group_size), groups_a_batch)


def log_chance(logit: Tensor, token: Tensor | int) -> Tensor:
    """Log-probability of a token that is 1 with the logit, 0 otherwise."""
    return torch.nn.functional.logsigmoid((2 * token - 1) * logit)


def sampled_logprobs(process: Process, rollouts: Rollouts) -> Tensor:
    """[N]: of the policy that sampled."""
    logits = torch.tensor(process.sampled or process.logits, dtype=torch.float64)
    return log_chance(logits[torch.tensor(process.observations)[rollouts.states]], rollouts.tokens)


def advantages(credit: CreditSum, rollouts: Rollouts, groups_a_batch: int) -> Tensor:
    """[N], by the credit; the turns that call are all but a trajectory's last.

    The outcome is the last reward; what calls earn stands in the place of a reward for format.
    """
    calls = torch.ones(len(rollouts.rewards), dtype=torch.bool)
    calls[rollouts.cu_turns[1:] - 1] = False
    groups = torch.arange(len(rollouts.outcomes)) // rollouts.group_size

    def of(first: int, end: int) -> Tensor:
        bounds, tokens = rollouts.cu_turns[first : end + 1], slice(*rollouts.cu_tokens[[first, end]].tolist())
        turns = slice(*bounds[[0, -1]].tolist())
        return credit_advantages(
            credit,
            rollouts.rewards[turns],
            bounds - bounds[0],
            groups[first:end],
            rollouts.turn_ids[tokens] - bounds[0],
            outcomes=rollouts.outcomes[first:end],
            anchor_ids=rollouts.anchors[turns],
            turns_with_calls=calls[turns],
            named_rewards={
                "outcome": rollouts.rewards[turns].masked_fill(calls[turns], 0.0),
                "format": rollouts.rewards[turns].masked_fill(~calls[turns], 0.0),
            },
        ).advantages

    # statistics of groups do not see other batches, so one call serves all
    sees_batch = credit.whiten or any(term.scope == "batch" for term in credit.terms)
    each = groups_a_batch * rollouts.group_size if sees_batch else len(groups)
    return torch.cat([of(first, first + each) for first in range(0, len(groups), each)])


def token_weights(rollouts: Rollouts, loss: PolicyLoss, groups_a_batch: int) -> tuple[Tensor, Tensor]:
    """(Mask [N] bool, weight [N]) of tokens in the loss's mean over a batch, with the constant 1."""
    masked = [end for end, is_out in (("truncated", loss.mask_truncated), ("void", loss.mask_void_turns)) if is_out]
    return _token_weights(rollouts, loss.aggregation, tuple(masked), groups_a_batch)


@lru_cache(maxsize=8)
def _token_weights(
    rollouts: Rollouts, aggregation: str, masked: tuple[str, ...], groups_a_batch: int
) -> tuple[Tensor, Tensor]:
    out = torch.tensor([end in masked for end in ENDS])[rollouts.ends]
    in_loss = ~out.repeat_interleave(rollouts.cu_tokens.diff())
    weights = torch.zeros(len(in_loss), dtype=torch.float64)
    each = groups_a_batch * rollouts.group_size
    for first in range(0, len(out), each):
        bounds = rollouts.cu_tokens[first : first + each + 1]
        tokens = slice(*bounds[[0, -1]].tolist())
        mean = loss_mean(
            aggregation,  # type: ignore[arg-type]
            in_loss[tokens],
            bounds - bounds[0],
            constant=1.0 if aggregation == "constant" else None,
        )
        weights[tokens] = (1.0 if mean.token_weights is None else mean.token_weights) / mean.num_loss_tokens
    return in_loss, weights.masked_fill(~in_loss, 0.0)


def sum_by_batch(process: Process, rollouts: Rollouts, gradients: Tensor, groups_a_batch: int) -> Tensor:
    """[number of batches, D] of the gradients [N] by the logits of tokens."""
    observation = torch.tensor(process.observations)[rollouts.states]
    batch = sequence_ids(rollouts.cu_tokens, len(gradients)) // (groups_a_batch * rollouts.group_size)
    num_batches, size = len(rollouts.outcomes) // (groups_a_batch * rollouts.group_size), len(process.logits)
    total = torch.zeros(num_batches * size, dtype=torch.float64)
    return total.index_add_(0, batch * size + observation, gradients).view(num_batches, size)


def judge(process: Process, name: str, batches: Tensor, exact: Tensor, group_size: int) -> Finding:
    """batches, exact: [n, D], from `updates` and `exact_updates`."""
    count, size = batches.shape
    gradient = process.gradient()
    mean, covariance = batches.mean(dim=0), torch.cov(batches.T).reshape(size, size)
    # takes the part along the gradient out; nothing, where there is none
    unit = gradient / gradient.norm() if process.has_gradient else torch.zeros_like(gradient)
    across = torch.eye(size, dtype=torch.float64) - torch.outer(unit, unit)
    off, spread = across @ mean, across @ covariance @ across
    degrees = size - int(process.has_gradient)
    statistic = float(count * off @ torch.linalg.pinv(spread, rtol=1e-9) @ off)
    # Wilson and Hilferty's approximation of the quantile of chi-squared
    quantile = degrees * (1 - 2 / (9 * degrees) + QUANTILE_Z * math.sqrt(2 / (9 * degrees))) ** 3
    noise = float(covariance.trace().sqrt())
    along = float(unit @ mean)
    unit_of_bias = abs(along) if process.has_gradient else noise
    # the square of a mean's length is too long by its variance
    length = math.sqrt(max(float(off @ off - spread.trace() / count), 0.0))
    found = Finding(
        process=process.name,
        method=name,
        group_size=group_size,
        num_batches=count,
        bias=length / unit_of_bias,
        bias_error=1.96 * math.sqrt(float(spread.trace()) / count) / unit_of_bias,
        is_biased=statistic > quantile or along < -QUANTILE_Z * noise / math.sqrt(count),
        signal=None,
        size=None,
        size_error=None,
        variance=None,
        variance_error=None,
        drift=float(mean.sum()) / noise,
    )
    if not process.has_gradient:
        return found
    variance, variance_error = relative_variance(batches @ unit, batches, exact @ unit, exact)
    return dataclasses.replace(
        found,
        signal=along / noise,
        size=along / float(gradient.norm()),
        size_error=1.96 * math.sqrt(float(unit @ covariance @ unit) / count) / float(gradient.norm()),
        variance=variance,
        variance_error=variance_error,
    )


def relative_variance(along: Tensor, batches: Tensor, exact_along: Tensor, exact: Tensor) -> tuple[float, float]:
    """Variance over squared mean of batches, over that of exact; and half its 95 % interval, by a jackknife of 20."""
    blocks = torch.arange(len(along)) % 20

    def ratio(kept: Tensor) -> Tensor:
        def of(x: Tensor, updates: Tensor) -> Tensor:
            return updates[kept].var(dim=0).sum() / x[kept].mean().square()

        return of(along, batches) / of(exact_along, exact)

    without = torch.stack([ratio(blocks != block) for block in range(20)])
    return float(ratio(blocks >= 0)), 1.96 * float((19 / 20 * (without - without.mean()).square().sum()).sqrt())


def study(
    num_batches: int,
    methods: Mapping[str, Method],
    *,
    processes: Sequence[Process] = PROCESSES,
    group_size: int = GROUP_SIZE,
    seed: int = 0,
) -> list[Finding]:
    """Every method on every process; all methods see the same trajectories."""
    findings = []
    for number, process in enumerate(processes):
        generator = torch.Generator().manual_seed(1000 * group_size + 100 * seed + number)
        rollouts = sample(process, num_batches * GROUPS_A_BATCH, group_size, generator)
        exact = exact_updates(process, rollouts, GROUPS_A_BATCH)
        for name, method in methods.items():
            batches = updates(process, method, rollouts, GROUPS_A_BATCH)
            findings.append(judge(process, name, batches, exact, group_size))
    return findings


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bias", description=__doc__)
    parser.add_argument("--batches", type=int, default=8000, help="batches a cell")
    options = parser.parse_args(arguments)
    results = Results(
        presets=study(options.batches, METHODS),
        credits=study(options.batches, CREDITS, processes=TURN_PROCESSES),
        credits_by_size=[
            finding
            for size in GROUP_SIZES
            for finding in study(
                options.batches // 2,
                {name: CREDITS[name] for name in BY_SIZE},
                processes=TURN_PROCESSES,
                group_size=size,
            )
        ],
    )
    RESULTS.write_text(results.as_json())
    bias_report.write(results)


if __name__ == "__main__":
    main()
