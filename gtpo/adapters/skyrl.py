"""SkyRL: the advantage estimator `gtpo`, the policy loss `gtpo`, and the trainer class that shows the turns to them.

SkyRL gives estimators a `response_mask` of all response tokens, tool output included, so turns cannot be seen in it.
`trainer_class` therefore passes the loss mask in its place.  In the script that starts SkyRL:

    register(scope="group")  # any option of the credit

    class Experiment(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return trainer_class()(*args, **kwargs)

with `trainer.algorithm.advantage_estimator=gtpo` and, for its loss, `trainer.algorithm.policy_loss_type=gtpo`.
Written against SkyRL 0.3.0.
"""

import contextlib
import contextvars
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtpo.adapters.layouts import token_reward_advantages
from gtpo.adapters.options import credit_settings, with_discount
from gtpo_kernels import LossRule, clipped_loss

NAME = "gtpo"
CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)
_loss_mask_passed = contextvars.ContextVar("loss_mask_passed", default=False)


def gtpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    values: Tensor | None = None,
    grpo_norm_by_std: bool = True,
    gamma: float = 1.0,
    lambd: float = 1.0,
    config: Any = None,
    credit: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """SkyRL's `advantage_estimator=gtpo`: `token_reward_advantages`, where each run of trained tokens is a turn.

    token_level_rewards: [B, T]; SkyRL lays a turn's reward on the last token of its assistant message.
    response_mask: [B, T], the loss mask, as the trainer of `trainer_class` passes it.
    index: the uid of each row's prompt.  gamma: `trainer.algorithm.gamma`, a discount from turn to turn (its default
        is 1.0, GTPO's 0.9); with a `method` in `credit` the discount is the preset's, or `credit`'s own.
    credit: options of `gtpo.adapters.layouts`, as `register` was given them.  values, grpo_norm_by_std, lambd, config:
        unused.
    Returns (advantages, returns), [B, T] each.
    Raises RuntimeError under another trainer, which would show whole responses as one turn; ValueError for a
        `trainer.algorithm.gamma` that is neither SkyRL's default nor the method's.
    Source: arXiv 2511.14846; the signature is that of `compute_advantages_and_returns` in
        skyrl/backends/skyrl_train/utils/ppo_utils.py.
    """
    if not _loss_mask_passed.get():
        raise RuntimeError(
            "SkyRL's own trainer hides the turns from its estimators: return gtpo.adapters.skyrl.trainer_class()(...) "
            "from BasePPOExp.get_trainer"
        )
    options = with_discount(credit or {}, gamma, key="trainer.algorithm.gamma")
    result = token_reward_advantages(token_level_rewards, response_mask, index, **options)
    return result.advantages, result.returns


def gtpo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's `policy_loss_type=gtpo`: `clipped_loss` with `config.eps_clip_low` and `config.eps_clip_high`.

    advantages: [B, T], which SkyRL has divided by what its `loss_reduction` asks for, so that the loss is their sum.
    rollout_logprobs: unused.  dual_clip: as `register` was given it.
    Returns (loss, metrics under SkyRL's names).
    Raises ValueError where `config.off_policy_correction` asks for a correction, which this loss does not apply.
    Source: arXiv 2511.14846; the signature is that of `ppo_policy_loss` in the same file.
    """
    correction = getattr(config, "off_policy_correction", None)
    asked = [name for name in CORRECTIONS if getattr(correction, name, None) is not None]
    if asked:
        raise ValueError(f"policy_loss_type=gtpo applies no off-policy correction, got {', '.join(asked)}")
    result = clipped_loss(
        log_probs.reshape(-1),
        advantages.expand_as(log_probs).reshape(-1).to(log_probs.dtype),
        loss_mask=None if loss_mask is None else loss_mask.bool().reshape(-1),
        old_logprobs=old_log_probs.reshape(-1),
        clip_low=float(config.eps_clip_low),
        clip_high=float(config.eps_clip_high),
        rule=LossRule(dual_clip=dual_clip),
        num_loss_tokens=1.0,
        metrics="all",
    )
    return result.loss, {"clip_ratio": (result.metrics.clip_low_fraction + result.metrics.clip_high_fraction).item()}


def trainer_class(base: Any = None) -> Any:
    """A subclass of `base` (None: SkyRL's `RayPPOTrainer`) whose estimators see the loss mask as response mask."""
    if base is None:
        from skyrl.train.trainer import RayPPOTrainer

        base = RayPPOTrainer

    class TurnCreditTrainer(base):
        @torch.no_grad()
        def compute_advantages_and_returns(self, data: Any) -> Any:
            with _loss_mask_shown(data):
                return super().compute_advantages_and_returns(data)

    return TurnCreditTrainer


@contextlib.contextmanager
def _loss_mask_shown(data: Any) -> Any:
    response_mask = data["response_mask"]
    data["response_mask"] = data["loss_mask"]
    token = _loss_mask_passed.set(True)
    try:
        yield
    finally:
        _loss_mask_passed.reset(token)
        data["response_mask"] = response_mask


def register(*, dual_clip: float | None = None, **options: Any) -> None:
    """Put `gtpo` into SkyRL's registries.  Call it before `ray.init`, in the process that starts the run.

    dual_clip: more than 1, for the loss: where the advantage is negative no ratio above it counts.  None for none.
    options: of the credit, those of `gtpo.adapters.layouts`; SkyRL's configuration takes no keys of its own.
    Raises ValueError for options that are no credit, or need more than SkyRL hands over.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, PolicyLossRegistry

    credit_settings(options, given=())
    # what the registries pickle for other processes has to hold the options itself
    AdvantageEstimatorRegistry.register(NAME, functools.partial(gtpo_advantages, credit=options))
    PolicyLossRegistry.register(NAME, functools.partial(gtpo_policy_loss, dual_clip=dual_clip))
