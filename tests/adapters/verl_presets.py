"""The losses of the presets in verl's terms, stated a second time, and ours of the same rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from gtpo.loss import loss_rule
from gtpo.methods import PolicyLoss
from gtpo_kernels import clipped_loss, loss_mean, sequence_ids
from tests.adapters.verl_losses import BATCH, LONGEST, Rows


class VerlLoss(NamedTuple):
    """name, mean: of the loss and of `agg_loss`.  clips: clip_ratio_low, _high and _c, which is out of reach where
    there is none.  penalty: name and coefficient of the KL term.  entropy: coefficient of the bonus."""

    name: str
    mean: str
    clips: tuple[float, float, float]
    penalty: tuple[str, float] | None = None
    entropy: float = 0.0

    @property
    def config(self) -> dict[str, float]:
        return dict(zip(("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"), self.clips, strict=True))


FAR = 1e6
GTPO = VerlLoss("vanilla", "token-mean", (0.2, 0.28, FAR))
VERL_CLIP = VerlLoss("vanilla", "token-mean", (0.2, 0.2, FAR))
# but those whose loss verl has none of
PRESETS = {
    "gtpo": GTPO,
    "gtpo_batch": GTPO,
    "kevin": GTPO,
    "maxrl": VERL_CLIP,
    "gdpo": VERL_CLIP,
    "hgpo": VerlLoss("vanilla", "token-mean", (0.2, 0.2, 3.0), ("low_var_kl", 0.01), 0.001),
    "gtpo_dense": GTPO,
    "grpo": GTPO,
    "deepseek_grpo": VerlLoss("vanilla", "seq-mean-token-mean", (0.2, 0.2, FAR), ("low_var_kl", 0.04)),
    "dr_grpo": VerlLoss("vanilla", "seq-mean-token-sum-norm", (0.2, 0.2, FAR)),
    "dapo": GTPO,
    "rloo": VerlLoss("gpg", "seq-mean-token-sum", (0.2, 0.2, FAR)),
    "turn_rloo": VerlLoss("vanilla", "seq-mean-token-sum-norm", (0.2, 0.28, FAR)),
    "reinforce_pp": VerlLoss("vanilla", "token-mean", (0.2, 0.2, FAR), ("mse", 0.001)),
    "gspo": VerlLoss("gspo", "seq-mean-token-mean", (3e-4, 4e-4, FAR)),
    "cispo": VerlLoss("cispo", "token-mean", (1.0, 4.0, FAR)),
    "mt_grpo": VERL_CLIP,
    "matchtir": VerlLoss("vanilla", "seq-mean-token-mean", (0.2, 0.2, 3.0), ("low_var_kl", 0.001), 0.001),
    "gigpo": VerlLoss("vanilla", "token-mean", (0.2, 0.2, 3.0), ("low_var_kl", 0.01), 0.001),
    "igpo": VerlLoss("vanilla", "token-mean", (0.2, 0.2, 3.0), ("low_var_kl", 0.001), 0.001),
    "simpletir": VerlLoss("vanilla", "seq-mean-token-mean", (0.2, 0.28, 3.0)),
}


def moved(rows: Rows) -> Rows:
    """Some tokens gain a factor of 6, so that every clip and the dual one act."""
    far = torch.arange(rows.logprobs.numel()).view_as(rows.logprobs) % 9 == 0
    return rows._replace(old_logprobs=torch.where(far, rows.logprobs - 1.8, rows.old_logprobs))


def preset_loss(loss: PolicyLoss, rows: Rows) -> tuple[Tensor, Tensor]:
    """`clipped_loss` of the rows with all that it says, and its gradient [2, BATCH, LONGEST].

    The entropy of a token is taken to be minus its log-probability under the reference, which only has to be a number.
    """
    mask, cu_seqlens = rows.mask.flatten(), torch.arange(BATCH + 1) * LONGEST
    constant = float(LONGEST) if loss.aggregation == "constant" else None
    mean = loss_mean(loss.aggregation, mask, cu_seqlens, constant=constant)
    leaf = torch.stack([rows.logprobs, -rows.ref_logprobs]).requires_grad_()
    value = clipped_loss(
        leaf[0].flatten(),
        rows.advantages.flatten(),
        loss_mask=mask,
        old_logprobs=rows.old_logprobs.flatten(),
        entropy=leaf[1].flatten(),
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        rule=loss_rule(loss),
        ref_logprobs=None if loss.kl == "none" else rows.ref_logprobs.flatten(),
        token_weights=mean.token_weights,
        ratio_ids=sequence_ids(cu_seqlens, len(mask)) if loss.ratio_level == "sequence" else None,
        num_loss_tokens=mean.num_loss_tokens,
    ).loss
    (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach(), gradient
