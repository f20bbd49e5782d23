"""The methods of the family as data: what a turn is paid and credited with, and what the loss makes of it.

A `Method` is three records of settings, `PRESETS` holds the published ones. Nothing here computes: rewards are
`gtpo.rewards`, the credit is `gtpo.credit`, the loss `gtpo.loss`.
"""

from gtpo.methods.checks import check_credit_fields, check_method, ranges_of
from gtpo.methods.describe import describe_credit, describe_loss, describe_reward
from gtpo.methods.overrides import TABLES, elsewhere, moved, overridden, overridden_credit
from gtpo.methods.preset import Preset
from gtpo.methods.presets import METHODS, NAMESAKES, PRESETS
from gtpo.methods.records import REWARD_TERMS, ROLLOUT_CORRECTIONS, CreditSum, Method, PolicyLoss, RewardRule, Term

__all__ = [
    "METHODS",
    "NAMESAKES",
    "PRESETS",
    "REWARD_TERMS",
    "ROLLOUT_CORRECTIONS",
    "TABLES",
    "CreditSum",
    "Method",
    "PolicyLoss",
    "Preset",
    "RewardRule",
    "Term",
    "check_credit_fields",
    "check_method",
    "describe_credit",
    "describe_loss",
    "describe_reward",
    "elsewhere",
    "moved",
    "overridden",
    "overridden_credit",
    "ranges_of",
]
