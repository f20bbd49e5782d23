"""The learner: packed sequences with advantages in, optimizer steps on the policy out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gtpo.batch import Batch, PackedSequence, pack, split_by_tokens
from gtpo.config import Config
from gtpo.loss import loss_rule
from gtpo.metrics import update_metrics
from gtpo.policy import Policy
from gtpo.schedule import learning_rate, split_evenly
from gtpo.staleness import refuse_logprob_gap
from gtpo_kernels import (
    LossMean,
    LossMetrics,
    linear_gtpo_loss,
    linear_token_logprobs,
    loss_mean,
    rollout_weights,
    sequence_ids,
)

# check(loss, gradient norm, micro-batches): raises where an optimizer step must not be taken.
Check = Callable[[float, float, Sequence[Batch]], None]


class Learner:
    """Gradients of the method's loss, accumulated over micro-batches under one denominator, and steps along them.

    It owns what training changes or holds on to beside the policy's weights: the optimizer with its moments, and the
    reference of a KL term.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy = policy
        self.config = config
        self.rule = loss_rule(config.loss)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            policy.trainable().values(), betas=(0.9, 0.95), weight_decay=config.train.weight_decay
        )
        # weights of the policy that a KL term holds on to; none where that is the model without its adapters
        self.reference: Mapping[str, Tensor] = {}

    @property
    def has_reference(self) -> bool:
        """Whether a KL term holds on to the policy that training began with, so that its weights are kept."""
        return self.rule.kl != "none" and self.config.loss.kl_reference == "start"

    @property
    def reference_is_base(self) -> bool:
        """Whether training begins with adapters that add nothing, since no warm-up has moved them."""
        return bool(self.config.model.lora_rank) and not self.config.sft.steps

    def keep_reference(self) -> None:
        """From now on a KL term holds on to the policy as it is at this moment."""
        if self.has_reference and not self.reference_is_base:
            self.reference = self.policy.reference_weights()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs beside the policy's weights; not copied."""
        return {"optimizer": self.optimizer.state_dict(), "reference": dict(self.reference)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.reference = {name: value.to(self.policy.reference_device) for name, value in state["reference"].items()}

    def update(self, sequences: Sequence[PackedSequence], *, step: int, check: Check) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on one rollout; returns their metrics.

        Raises StaleSampler, before a step is taken, where the log-probs in `sequences` are not those of the policy.
        """
        config = self.config.train
        parts = split_evenly(sequences, config.updates_per_rollout)
        batches = [self.micro_batches(part) for part in parts]
        if len(batches) > 1:
            # the policy moves between the parts: log-probs of the policy that sampled are taken before the first step
            batches = [[self.with_old_logprobs(batch) for batch in part] for part in batches]
        if self.has_reference:
            batches = [[self.with_ref_logprobs(batch) for batch in part] for part in batches]
        rate = learning_rate(
            step, total=config.steps, base=config.learning_rate, warmup=config.warmup_steps, schedule=config.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        collected: list[LossMetrics] = []
        losses, norms, gaps = [], [], []
        for part in batches:
            num_loss_tokens = sum(float(self.mean_of(batch).num_loss_tokens) for batch in part)
            if num_loss_tokens == 0:
                continue
            loss = 0.0
            for batch in part:
                value, metrics, gap = self.accumulate_gradient(batch, num_loss_tokens=num_loss_tokens)
                loss += value
                collected.append(metrics)
                gaps.append(gap)
            norm = float(torch.nn.utils.clip_grad_norm_(self.policy.trainable().values(), config.max_grad_norm))
            check(loss, norm, part)
            refuse_logprob_gap(
                gaps[-len(part) :], bound=self.config.rollout.max_logprob_gap, bfloat16=self.policy.bfloat16, step=step
            )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            norms.append(norm)
        means = {"loss": _mean(losses), "grad_norm": _mean(norms)}
        return {"learning_rate": rate, **means, **update_metrics(collected, gaps)}

    def accumulate_gradient(self, batch: Batch, *, num_loss_tokens: float) -> tuple[float, LossMetrics, Tensor]:
        """Adds the gradient of one micro-batch to the parameters; their sum is the gradient of the whole batch.

        num_loss_tokens: the denominator of the mean over the whole batch, see `mean_of`.
        The third value is, for each token of the loss, how far the sampler's log-prob is from the trainer's, in nats.
        """
        hidden = self.policy.hidden_states(batch)
        sampled = batch.loss_mask
        if batch.old_logprobs is None:
            old_logprobs = self._logprobs(hidden.detach()[sampled], batch.targets[sampled])
        else:
            old_logprobs = batch.old_logprobs[sampled]
        gap = (old_logprobs - batch.rollout_logprobs[sampled]).abs()
        advantages = batch.advantages
        if self.config.loss.rollout_correction != "none":
            advantages = advantages * self._rollout_weights(batch, old_logprobs)
        loss, metrics = linear_gtpo_loss(
            hidden,
            self.policy.head.weight,
            batch.targets,
            advantages,
            bias=self.policy.logit_bias,
            loss_mask=batch.loss_mask,
            old_logprobs=batch.rollout_logprobs if self.config.loss.ratio_to == "sampler" else batch.old_logprobs,
            temperature=self.config.rollout.temperature,
            clip_low=self.config.loss.clip_low,
            clip_high=self.config.loss.clip_high,
            rule=self.rule,
            ref_logprobs=batch.ref_logprobs if self.has_reference or self.rule.kl == "none" else batch.rollout_logprobs,
            token_weights=self.mean_of(batch).token_weights,
            ratio_ids=_shared_ids(batch, self.config.loss.ratio_level),
            num_loss_tokens=float(num_loss_tokens),
        )
        loss.backward()
        return float(loss.detach()), metrics, gap

    def mean_of(self, batch: Batch) -> LossMean:
        """What a micro-batch brings to the method's mean over tokens; the denominators add up."""
        rule, constant = self.config.loss, None
        if rule.aggregation == "constant":
            constant = rule.aggregation_constant or float(self.config.rollout.max_trajectory_tokens)
        return loss_mean(rule.aggregation, batch.loss_mask, batch.cu_seqlens, constant=constant)

    def _rollout_weights(self, batch: Batch, old_logprobs: Tensor) -> Tensor:
        """old_logprobs: of the tokens in the loss."""
        rule = self.config.loss
        assert rule.rollout_correction != "none"
        return rollout_weights(
            torch.zeros_like(batch.rollout_logprobs).masked_scatter(batch.loss_mask, old_logprobs),
            batch.rollout_logprobs,
            batch.loss_mask,
            correction=rule.rollout_correction,
            low=rule.rollout_correction_low,
            high=rule.rollout_correction_high,
            ratio_ids=_shared_ids(batch, rule.rollout_correction_level),
        )

    def micro_batches(self, sequences: Sequence[PackedSequence]) -> list[Batch]:
        groups = split_by_tokens(sequences, max_tokens=self.config.train.micro_batch_tokens)
        return [pack(group, device=self.policy.device) for group in groups]

    @torch.no_grad()
    def with_old_logprobs(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, old_logprobs=self._loss_logprobs(batch))

    @torch.no_grad()
    def with_ref_logprobs(self, batch: Batch) -> Batch:
        policy = self.policy
        with policy.without_adapters() if self.reference_is_base else policy.as_reference(self.reference):
            logprobs = self._loss_logprobs(batch)
        return dataclasses.replace(batch, ref_logprobs=logprobs)

    def _loss_logprobs(self, batch: Batch) -> Tensor:
        """[N]; 0 outside the loss, where no row is projected."""
        in_loss = batch.loss_mask
        logprobs = self._logprobs(self.policy.hidden_states(batch)[in_loss], batch.targets[in_loss])
        return torch.zeros_like(batch.rollout_logprobs).masked_scatter(in_loss, logprobs)

    @torch.no_grad()
    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logprobs: Tensor = linear_token_logprobs(
            hidden,
            self.policy.head.weight,
            targets,
            bias=self.policy.logit_bias,
            temperature=self.config.rollout.temperature,
        ).logprobs
        return logprobs


def _shared_ids(batch: Batch, level: str) -> Tensor | None:
    """Which tokens share a ratio: those of a turn or of a sequence; None where each has its own."""
    if level == "token":
        return None
    return batch.turn_ids if level == "turn" else sequence_ids(batch.cu_seqlens, len(batch.targets))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
