"""The loss of a method as `gtpo_kernels` takes it."""

from gtpo.methods import PolicyLoss
from gtpo_kernels import LossRule


def loss_rule(loss: PolicyLoss) -> LossRule:
    """The surrogate, its bounds beside the two clips, and what is added to it.

    >>> from gtpo.methods import METHODS
    >>> loss_rule(METHODS["deepseek_grpo"].loss).kl
    'k3'
    """
    return LossRule(*(getattr(loss, field) for field in LossRule._fields))
