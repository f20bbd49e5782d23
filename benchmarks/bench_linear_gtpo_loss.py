"""`linear_gtpo_loss`, forward and backward from hidden states to d_hidden and d_weight, float32.

Beside it: eager PyTorch that holds the [N, V] logits, and the floor, three matrix products that nothing can avoid.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gtpo_kernels import linear_gtpo_loss

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class Batch(NamedTuple):
    """hidden [N, D] and weight [V, D] are leaves; the others are [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor


def make_batch(num_rows: int, vocab: int, width: int, masked: float) -> Batch:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * (2 / width**0.5)
    targets = torch.randint(vocab, (num_rows,), generator=generator)
    logprobs = torch.log_softmax(hidden @ weight.T, dim=1).gather(1, targets[:, None]).squeeze(1)
    return Batch(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        torch.randn(num_rows, generator=generator),
        torch.rand(num_rows, generator=generator) >= masked,
        logprobs + 0.2 * torch.randn(num_rows, generator=generator),
    )


def ours(batch: Batch) -> Tensor:
    return linear_gtpo_loss(**batch._asdict(), clip_low=CLIP_LOW, clip_high=CLIP_HIGH, backend="torch").loss


def eager(batch: Batch) -> Tensor:
    """The same loss as anyone would write it, without metrics."""
    logits = batch.hidden @ batch.weight.T
    logprobs = torch.log_softmax(logits, dim=1).gather(1, batch.targets[:, None]).squeeze(1)
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return -(surrogate * batch.loss_mask).sum() / batch.loss_mask.sum()


def forward_backward(loss: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, ...]:
    value = loss(batch)
    return value.detach(), *torch.autograd.grad(value, (batch.hidden, batch.weight))


def three_products(batch: Batch) -> None:
    """6NVD floating-point operations over the rows of the loss mask, and nothing else."""
    hidden, weight = batch.hidden.detach()[batch.loss_mask], batch.weight.detach()
    logits = hidden @ weight.T
    _ = logits @ weight, logits.T @ hidden


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["all-rows", "30%-masked"])
def batch(request: pytest.FixtureRequest, smoke: bool) -> Batch:
    """Made, and both losses checked on it, before anything is timed."""
    shape = (64, 257, 32) if smoke else (2048, 32768, 512)
    made = make_batch(*shape, masked=request.param)
    for one, other in zip(forward_backward(ours, made), forward_backward(eager, made), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    return made


def facts(batch: Batch) -> dict[str, Any]:
    num_rows, width = batch.hidden.shape
    return {
        "num_rows": num_rows,
        "active_rows": int(batch.loss_mask.sum()),
        "vocab": batch.weight.shape[0],
        "width": width,
        "threads": torch.get_num_threads(),
    }


def bench_ours_torch(batch: Batch, measure: Callable[..., None]) -> None:
    measure(lambda: forward_backward(ours, batch), **facts(batch))


def bench_eager(batch: Batch, measure: Callable[..., None]) -> None:
    measure(lambda: forward_backward(eager, batch), **facts(batch))


def bench_floor_three_products(batch: Batch, measure: Callable[..., None]) -> None:
    measure(lambda: three_products(batch), **facts(batch))
