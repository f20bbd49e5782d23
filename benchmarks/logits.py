"""`make bench-logits`: the clipped loss from logits, forward and gradient, float32.

Beside `gtpo_loss_`, which turns its logits into their gradient, and `gtpo_loss`: eager PyTorch, and the same loss on
`F.cross_entropy`.  The floor is one in-place product with a number: each logit read once and written once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.linear import (
    ALLOWED_ERROR,
    CLIP_HIGH,
    CLIP_LOW,
    CPU_BACKENDS,
    away_from_clip_edges,
    clipped_loss,
    token_logprobs,
)
from benchmarks.measure import (
    Contestant,
    Outputs,
    Row,
    compare,
    find,
    parse_arguments,
    publish,
    set_ratios,
    smoke_run,
)
from gtpo_kernels import gtpo_loss, gtpo_loss_
from gtpo_kernels.backend import select_backend

FLOOR, EAGER, CROSS_ENTROPY = "floor: logits.mul_", "eager log_softmax", "F.cross_entropy"
ROUNDS = 7


@dataclass(frozen=True)
class LogitsBatch:
    """logits [N, V], a leaf; spent [N, V], a copy that calls overwrite; the others are [N]."""

    logits: Tensor
    spent: Tensor
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor

    def restore(self) -> None:
        self.spent.copy_(self.logits.detach())


def make_batch(
    num_rows: int, vocab: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LogitsBatch:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(num_rows, vocab, dtype=dtype, device=device).normal_(std=2.0, generator=generator)
    targets = torch.randint(vocab, (num_rows,), generator=generator, device=device)
    chunks = zip(logits.split(256), targets.split(256), strict=True)
    logprobs = torch.cat([token_logprobs(x.float(), t) for x, t in chunks])
    advantages, noise = torch.randn(2, num_rows, generator=generator, device=device)
    old_logprobs = logprobs - away_from_clip_edges(0.2 * noise)
    mask = torch.ones(num_rows, dtype=torch.bool, device=device)
    return LogitsBatch(logits.requires_grad_(), logits.detach().clone(), targets, advantages, mask, old_logprobs)


def exact_outputs(batch: LogitsBatch, dtype: torch.dtype = torch.float64) -> Outputs:
    d_logits = torch.empty(batch.logits.shape, dtype=dtype, device=batch.logits.device)
    total = torch.zeros((), dtype=dtype, device=d_logits.device)
    for rows in torch.arange(len(d_logits), device=d_logits.device).split(128):
        logits = batch.logits.detach()[rows].to(dtype).requires_grad_()
        others = (value[rows] for value in (batch.advantages, batch.loss_mask, batch.old_logprobs))
        logprobs = token_logprobs(logits, batch.targets[rows])
        part = clipped_loss(logprobs, *others, num_loss_tokens=batch.loss_mask.sum())
        (d_logits[rows],) = torch.autograd.grad(part, logits)
        total += part.detach()
    return {"loss": total, "d_logits": d_logits}


def _our_arguments(batch: LogitsBatch, backend: str) -> dict[str, Any]:
    select_backend("gtpo_loss", backend, batch.logits.device)
    return {
        "targets": batch.targets,
        "advantages": batch.advantages,
        "loss_mask": batch.loss_mask,
        "old_logprobs": batch.old_logprobs,
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "backend": backend,
    }


def _in_place(backend: str, batch: LogitsBatch) -> Callable[[], Outputs]:
    arguments = _our_arguments(batch, backend)
    return lambda: {"loss": gtpo_loss_(batch.spent, **arguments).loss, "d_logits": batch.spent}


def _functional(backend: str, batch: LogitsBatch) -> Callable[[], Outputs]:
    arguments = _our_arguments(batch, backend)
    return partial(_forward_backward, lambda logits: gtpo_loss(logits, **arguments).loss, batch)


def _plain(logprobs: Callable[[Tensor, Tensor], Tensor], batch: LogitsBatch) -> Callable[[], Outputs]:
    def loss(logits: Tensor) -> Tensor:
        return clipped_loss(logprobs(logits, batch.targets), batch.advantages, batch.loss_mask, batch.old_logprobs)

    return partial(_forward_backward, loss, batch)


def _forward_backward(loss: Callable[[Tensor], Tensor], batch: LogitsBatch) -> Outputs:
    value = loss(batch.logits)
    (d_logits,) = torch.autograd.grad(value, batch.logits)
    return {"loss": value.detach(), "d_logits": d_logits}


def _eager_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(logits.float(), targets)


def _cross_entropy_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _scale(batch: LogitsBatch) -> Callable[[], Outputs]:
    def scale() -> Outputs:
        batch.spent.mul_(1.0)
        return {}

    return scale


def contestants(backends: Sequence[str]) -> list[Contestant[LogitsBatch]]:
    return [
        Contestant(FLOOR, "torch", _scale),
        *(Contestant(f"gtpo_loss_, {b}", b, partial(_in_place, b), LogitsBatch.restore) for b in backends),
        *(Contestant(f"gtpo_loss, {b}", b, partial(_functional, b)) for b in backends),
        Contestant(EAGER, "torch", partial(_plain, _eager_logprobs), max_rounds=3),
        Contestant(CROSS_ENTROPY, "torch", partial(_plain, _cross_entropy_logprobs), max_rounds=3),
    ]


def measure_shape(num_rows: int, vocab: int, rounds: int) -> list[Row]:
    batch = make_batch(num_rows, vocab)
    rows = compare(
        contestants(CPU_BACKENDS),
        batch,
        exact_outputs(batch),
        lambda name, backend: Row(name, backend, {"N": num_rows, "V": vocab}, "float32", 0.0),
        allowed=ALLOWED_ERROR[torch.float32],
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_batch(64, 257),
    )
    set_ratios(rows, find(rows, FLOOR).cpu_s)
    for yardstick in (EAGER, CROSS_ENTROPY):
        set_ratios(rows, find(rows, yardstick).cpu_s, f"x {yardstick}")
    return rows


def judge(rows: Sequence[Row]) -> None:
    """The gates of `gtpo_loss_` in C++; a figure that is missing fails."""
    line = find(rows, "gtpo_loss_, cpp")
    missing = float("inf")
    line.gate("CPU <= 1/15 eager", line.ratios.get(f"x {EAGER}", missing) <= 1 / 15)
    line.gate("CPU <= 1/7 F.cross_entropy", line.ratios.get(f"x {CROSS_ENTROPY}", missing) <= 1 / 7)
    line.gate("CPU <= 1.8 x floor", (line.ratio_to_floor or missing) <= 1.8)
    line.gate("memory < 1 MiB", line.extra_mb is not None and line.extra_mb < 1)


CAPTION = """Clipped loss from logits, forward + gradient.  CPU ms: of all threads; medians of interleaved rounds.
extra MiB: peak above what was held before, the logits not included.  x floor: CPU time over that of one in-place
product of the logits with a number.  errors: loss, d_logits, relative to float64."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke):
        rows = measure_shape(*((64, 257) if options.smoke else (1024, 151936)), rounds=1 if options.smoke else ROUNDS)
    if not options.smoke:
        judge(rows)
    publish("bench-logits", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
