"""Fused PyTorch ops for turn-level policy optimisation.  Needs torch only.

An op is `gtpo_kernels/<family>/op.py`; beside it, `reference.py` is its definition, `kernel_<backend>.py` what runs.
"""

from gtpo_kernels.backend import BackendUnavailable
from gtpo_kernels.clipped_loss.op import clipped_loss
from gtpo_kernels.clipped_loss.reference import ClippedLoss, LossMetrics, LossRule
from gtpo_kernels.clipped_loss.weights import LossMean, loss_mean, rollout_weights, sequence_ids
from gtpo_kernels.gtpo_loss.op import gtpo_loss, gtpo_loss_, linear_gtpo_loss
from gtpo_kernels.token_logprobs.op import linear_token_logprobs, token_logprobs
from gtpo_kernels.token_logprobs.reference import TokenLogprobs
from gtpo_kernels.turn_advantages.op import CreditTerm, TurnCredit, combined_advantages, turn_advantages, turn_returns
from gtpo_kernels.turn_advantages.reference import CreditRule, TurnAdvantages

__all__ = [
    "BackendUnavailable",
    "ClippedLoss",
    "CreditRule",
    "CreditTerm",
    "LossMean",
    "LossMetrics",
    "LossRule",
    "TokenLogprobs",
    "TurnAdvantages",
    "TurnCredit",
    "clipped_loss",
    "combined_advantages",
    "gtpo_loss",
    "gtpo_loss_",
    "linear_gtpo_loss",
    "linear_token_logprobs",
    "loss_mean",
    "rollout_weights",
    "sequence_ids",
    "token_logprobs",
    "turn_advantages",
    "turn_returns",
]
