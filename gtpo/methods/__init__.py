"""The methods of the family as data: what a turn is credited with, and what the loss makes of it.

A `Method` is one row of settings, `PRESETS` holds the published ones. Nothing here computes: the credit is
`gtpo.credit`, the loss `gtpo_kernels`.
"""

from gtpo.methods.describe import describe_credit, describe_loss, describe_reward
from gtpo.methods.method import Method, Term, check_method, drop_idle
from gtpo.methods.presets import METHODS, NAMESAKES, PRESETS, Preset

__all__ = [
    "METHODS",
    "NAMESAKES",
    "PRESETS",
    "Method",
    "Preset",
    "Term",
    "check_method",
    "describe_credit",
    "describe_loss",
    "describe_reward",
    "drop_idle",
]
