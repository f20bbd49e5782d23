"""The learner: packed sequences with advantages in, optimizer steps on the policy out."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gtpo.batch import Batch, PackedSequence, pack, split_by_tokens
from gtpo.config import Config
from gtpo.metrics import update_metrics
from gtpo.policy import Policy
from gtpo.schedule import learning_rate, split_evenly
from gtpo_kernels import LossMetrics, linear_gtpo_loss, linear_token_logprobs

# check(loss, gradient norm, micro-batches): raises where an optimizer step must not be taken.
Check = Callable[[float, float, Sequence[Batch]], None]


class Learner:
    """Gradients of the method's loss, accumulated over micro-batches under one denominator, and steps along them."""

    def __init__(self, policy: Policy, config: Config) -> None:
        self.policy = policy
        self.config = config

    def update(
        self, sequences: Sequence[PackedSequence], optimizer: torch.optim.Optimizer, *, step: int, check: Check
    ) -> dict[str, float]:
        """`updates_per_rollout` optimizer steps on one rollout; returns their metrics."""
        config = self.config.train
        parts = split_evenly(sequences, config.updates_per_rollout)
        batches = [self.micro_batches(part) for part in parts]
        if len(batches) > 1:
            # the policy moves between the parts: log-probs of the policy that sampled are taken before the first step
            batches = [[self.with_old_logprobs(batch) for batch in part] for part in batches]
        rate = learning_rate(
            step, total=config.steps, base=config.learning_rate, warmup=config.warmup_steps, schedule=config.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        collected: list[LossMetrics] = []
        losses, norms, gaps = [], [], []
        for part in batches:
            num_loss_tokens = sum(batch.num_loss_tokens for batch in part)
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
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            norms.append(norm)
        means = {"loss": _mean(losses), "grad_norm": _mean(norms)}
        return {"learning_rate": rate, **means, **update_metrics(collected, gaps)}

    def accumulate_gradient(self, batch: Batch, *, num_loss_tokens: int) -> tuple[float, LossMetrics, Tensor]:
        """Adds the gradient of one micro-batch to the parameters; their sum is the gradient of the whole batch.

        The third value is, for each token of the loss, how far the sampler's log-prob is from the trainer's, in nats.
        """
        hidden = self.policy.hidden_states(batch)
        sampled = batch.loss_mask
        if batch.old_logprobs is None:
            old_logprobs = self._logprobs(hidden.detach()[sampled], batch.targets[sampled])
        else:
            old_logprobs = batch.old_logprobs[sampled]
        gap = (old_logprobs - batch.rollout_logprobs[sampled]).abs()
        loss, metrics = linear_gtpo_loss(
            hidden,
            self.policy.head.weight,
            batch.targets,
            batch.advantages,
            bias=self.policy.head.bias,
            loss_mask=batch.loss_mask,
            old_logprobs=batch.old_logprobs,
            temperature=self.config.rollout.temperature,
            clip_low=self.config.credit.clip_low,
            clip_high=self.config.credit.clip_high,
            num_loss_tokens=float(num_loss_tokens),
        )
        loss.backward()
        return float(loss.detach()), metrics, gap

    def micro_batches(self, sequences: Sequence[PackedSequence]) -> list[Batch]:
        groups = split_by_tokens(sequences, max_tokens=self.config.train.micro_batch_tokens)
        return [pack(group, device=self.policy.device) for group in groups]

    @torch.no_grad()
    def with_old_logprobs(self, batch: Batch) -> Batch:
        logprobs = self._logprobs(self.policy.hidden_states(batch), batch.targets)
        return dataclasses.replace(batch, old_logprobs=logprobs)

    @torch.no_grad()
    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logprobs: Tensor = linear_token_logprobs(
            hidden,
            self.policy.head.weight,
            targets,
            bias=self.policy.head.bias,
            temperature=self.config.rollout.temperature,
        ).logprobs
        return logprobs


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
