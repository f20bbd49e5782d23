"""The definition of `gtpo_loss` and `linear_gtpo_loss`: the per-token op, then the clipped loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.clipped_loss.reference import (
    ClippedLoss,
    LossTerms,
    active_tokens,
    clipped_loss_reference,
    counted_tokens,
    differentiable_where,
)
from gtpo_kernels.token_logprobs.reference import project, token_logprobs_reference


class LossInputs(NamedTuple):
    """What the losses from logits and from hidden states share; see `gtpo_kernels.gtpo_loss`.

    temperature: for all rows, or 1.0 where row_temperature [N] is given.  softcap: 0.0 for none.
    num_loss_tokens: scalar tensor, or None for the size of the loss mask.
    """

    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor | None
    temperature: float
    row_temperature: Tensor | None
    softcap: float
    num_loss_tokens: Tensor | None
    terms: LossTerms
    all_metrics: bool

    def flat(self) -> tuple[Any, ...]:
        """The fields, and in place of `terms` its own: what the registered ops take."""
        return *self[:-2], *self.terms, self.all_metrics

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> "LossInputs":
        """The inputs whose `flat()` this is."""
        first = cls._fields.index("terms")
        return cls._make([*flat[:first], LossTerms(*flat[first:-1]), flat[-1]])


class GradientFilter(NamedTuple):
    """What the two gradient products of `linear_gtpo_loss` leave out; see there.  (False, 0.0) leaves out nothing."""

    skip_clipped: bool
    filter_eps: float


def gtpo_loss_reference(logits: Tensor, inputs: LossInputs) -> ClippedLoss:
    """`gtpo_loss` as its definition; see `gtpo_kernels.gtpo_loss`."""
    i = inputs
    skipped = ~counted_tokens(i.advantages, i.loss_mask, i.terms, i.all_metrics)
    token = token_logprobs_reference(
        differentiable_where(
            active_tokens(i.advantages, i.loss_mask, i.terms), logits.masked_fill(skipped[:, None], 0.0)
        ),
        i.targets.masked_fill(skipped, 0),
        i.temperature if i.row_temperature is None else i.row_temperature.masked_fill(skipped, 1.0),
        i.softcap,
    )
    return clipped_loss_reference(
        token.logprobs,
        i.advantages,
        i.loss_mask,
        i.old_logprobs,
        token.entropy,
        i.num_loss_tokens,
        i.terms,
        i.all_metrics,
    )


def linear_gtpo_loss_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: LossInputs) -> ClippedLoss:
    """`linear_gtpo_loss` as its definition; see `gtpo_kernels.linear_gtpo_loss`."""
    # the weight gradient of a row is d_logits x hidden, so what a row without gradient holds must not reach it
    active = active_tokens(inputs.advantages, inputs.loss_mask, inputs.terms)
    logits = project(hidden.masked_fill(~active[:, None], 0.0), weight, bias)
    if inputs.all_metrics:
        with torch.no_grad():
            others = project(hidden.masked_fill(~inputs.loss_mask[:, None], 0.0), weight, bias)
        logits = torch.where(active[:, None], logits, others)
    return gtpo_loss_reference(logits, inputs)


def gtpo_loss_reference_(logits: Tensor, inputs: LossInputs) -> ClippedLoss:
    """`gtpo_loss_` as its definition: the gradient that autograd finds, copied over the logits."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        loss, metrics = gtpo_loss_reference(leaf, inputs)
        (d_logits,) = torch.autograd.grad(loss, leaf)
    logits.copy_(d_logits)
    return ClippedLoss(loss.detach(), metrics)
