"""`make bench-linear`: `linear_gtpo_loss`, forward and backward from hidden states to d_hidden and d_weight.

Beside it every peer that computes the same clipped loss from hidden states and a head, and the floor: the three matrix
products that nothing can avoid, over all rows, into tensors they allocate or into ready ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    MIB,
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
from gtpo_kernels import ClippedLoss, linear_gtpo_loss
from gtpo_kernels.backend import select_backend

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
NUM_TRAJECTORIES = 8
FLOOR, READY_FLOOR = "floor: three products", "floor: products into ready tensors"
# Relative error above which a result is of another function, far above what rounding does.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Of the peers near the floor, and of those at twice to five times its time.
PEER_ROUNDS, SLOW_ROUNDS = 3, 2


@dataclass(frozen=True)
class LinearBatch:
    """hidden [N, D] and weight [V, D] are leaves; the others are [N].

    Rows are of NUM_TRAJECTORIES trajectories of equal length, and an advantage is one number a trajectory, because
    Liger's loss knows no other; ours takes one a token or a turn at the same cost.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def by_trajectory(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (NUM_TRAJECTORIES, -1))


def make_batch(
    num_rows: int,
    vocab: int,
    width: int,
    *,
    mask_fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LinearBatch:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(num_rows, width).to(dtype)
    weight = (normal(vocab, width) * (2 / width**0.5)).to(dtype)
    targets = torch.randint(vocab, (num_rows,), generator=generator, device=device)
    chunks = zip(hidden.split(256), targets.split(256), strict=True)
    logprobs = torch.cat([token_logprobs((h @ weight.T).float(), t) for h, t in chunks])
    return LinearBatch(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        normal(NUM_TRAJECTORIES).repeat_interleave(num_rows // NUM_TRAJECTORIES),
        torch.rand(num_rows, generator=generator, device=device) >= mask_fraction,
        logprobs - away_from_clip_edges(0.2 * normal(num_rows)),
    )


def away_from_clip_edges(log_ratios: Tensor) -> Tensor:
    """Those within 0.05 of a clip edge moved there: at the edge, rounding would decide whether a row has a gradient."""
    for edge in (math.log(1 - CLIP_LOW), math.log(1 + CLIP_HIGH)):
        near = (log_ratios - edge).abs() < 0.05
        log_ratios = torch.where(near, edge + torch.where(log_ratios < edge, -0.05, 0.05), log_ratios)
    return log_ratios


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)


def clipped_loss(
    logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, old_logprobs: Tensor, num_loss_tokens: Tensor | None = None
) -> Tensor:
    """The loss as anyone would write it: what peers that give log-probabilities are completed with."""
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    return -(surrogate * loss_mask).sum() / (loss_mask.sum() if num_loss_tokens is None else num_loss_tokens)


def exact_outputs(batch: LinearBatch, dtype: torch.dtype = torch.float64) -> Outputs:
    """Loss and gradients in `dtype`, rows in chunks."""
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in batch.leaves)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(256):
        logprobs = token_logprobs(hidden[rows] @ weight.T, batch.targets[rows])
        others = (value[rows] for value in (batch.advantages, batch.loss_mask, batch.old_logprobs))
        part = clipped_loss(logprobs, *others, num_loss_tokens=batch.loss_mask.sum())
        part.backward()
        loss += part.detach()
    return {"loss": loss, "d_hidden": hidden.grad, "d_weight": weight.grad}


def forward_backward(loss: Callable[[LinearBatch], Tensor], batch: LinearBatch) -> Outputs:
    value = loss(batch)
    d_hidden, d_weight = torch.autograd.grad(value, batch.leaves)
    return {"loss": value.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def fused_loss(batch: LinearBatch, backend: str | None = None, **options: Any) -> ClippedLoss:
    return linear_gtpo_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.advantages,
        loss_mask=batch.loss_mask,
        old_logprobs=batch.old_logprobs,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        backend=backend,
        **options,
    )


def ours(batch: LinearBatch, backend: str, **options: Any) -> Tensor:
    return fused_loss(batch, backend, **options).loss


def eager(batch: LinearBatch) -> Tensor:
    logits = (batch.hidden @ batch.weight.T).float()
    return clipped_loss(token_logprobs(logits, batch.targets), batch.advantages, batch.loss_mask, batch.old_logprobs)


def _with_backend(backend: str, batch: LinearBatch) -> Callable[[], Outputs]:
    select_backend("gtpo_loss", backend, batch.hidden.device)
    return partial(forward_backward, partial(ours, backend=backend), batch)


def _eager(batch: LinearBatch) -> Callable[[], Outputs]:
    return partial(forward_backward, eager, batch)


def _compiled(batch: LinearBatch) -> Callable[[], Outputs]:
    return partial(forward_backward, torch.compile(eager, dynamic=False), batch)


def _three_products(batch: LinearBatch) -> Callable[[], Outputs]:
    hidden, weight = (leaf.detach() for leaf in batch.leaves)

    def products() -> Outputs:
        logits = hidden @ weight.T
        _ = logits @ weight, logits.T @ hidden
        return {}

    return products


def _ready_products(batch: LinearBatch) -> Callable[[], Outputs]:
    hidden, weight = (leaf.detach() for leaf in batch.leaves)
    # zeros rather than empty, whose pages would only be there after the first call
    logits = hidden.new_zeros(len(hidden), len(weight))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def products() -> Outputs:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
        return {}

    return products


def _liger(batch: LinearBatch, **options: Any) -> Callable[[], Outputs]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="bnpo",
        **options,
    )

    def loss(batch: LinearBatch) -> Tensor:
        targets, mask, old_logprobs = map(batch.by_trajectory, (batch.targets, batch.loss_mask, batch.old_logprobs))
        advantages = batch.by_trajectory(batch.advantages)[:, 0]
        hidden = batch.by_trajectory(batch.hidden)
        value, _ = module(hidden, batch.weight, targets, mask, advantages, old_per_token_logps=old_logprobs)
        return value

    return partial(forward_backward, loss, batch)


def _from_logprobs(logprobs: Callable[[LinearBatch], Tensor], batch: LinearBatch) -> Callable[[], Outputs]:
    def loss(batch: LinearBatch) -> Tensor:
        return clipped_loss(logprobs(batch), batch.advantages, batch.loss_mask, batch.old_logprobs)

    return partial(forward_backward, loss, batch)


def _cut_cross_entropy(batch: LinearBatch) -> Callable[[], Outputs]:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(batch: LinearBatch) -> Tensor:
        # it leaves rows with the ignored target out of all products
        targets = batch.targets.masked_fill(~batch.loss_mask, -100)
        impl = "cce" if batch.hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(batch.hidden, batch.weight, targets, reduction="none", impl=impl).float()

    return _from_logprobs(logprobs, batch)


def _trl(batch: LinearBatch) -> Callable[[], Outputs]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # the function's own arguments: bias, targets, temperature, vocabulary entries a chunk, softcap, scale, outputs
    def logprobs(batch: LinearBatch) -> Tensor:
        arguments = (None, batch.targets, 1.0, 8192, None, 1.0, ())
        return ChunkedLogProbFunction.apply(batch.hidden, batch.weight, *arguments)[0]

    return _from_logprobs(logprobs, batch)


def _torch_linear_cross_entropy(batch: LinearBatch) -> Callable[[], Outputs]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    def logprobs(batch: LinearBatch) -> Tensor:
        options = LinearCrossEntropyOptions()
        return -linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", options=options)

    return _from_logprobs(logprobs, batch)


FLOORS = [Contestant(FLOOR, "torch", _three_products), Contestant(READY_FLOOR, "torch", _ready_products)]
EAGER = Contestant("eager log_softmax", "torch", _eager)
COMPILED = Contestant("torch.compile of eager", "torch", _compiled, compiles=True, max_rounds=PEER_ROUNDS)
PEERS = [
    COMPILED,
    Contestant(
        "Liger fused-linear GRPO, chunks of 8",
        "liger-kernel",
        partial(_liger, chunk_size=8, compiled=False),
        max_rounds=SLOW_ROUNDS,
    ),
    Contestant("Liger fused-linear GRPO, default", "liger-kernel", _liger, compiles=True, max_rounds=SLOW_ROUNDS),
    Contestant("cut-cross-entropy", "cut-cross-entropy", _cut_cross_entropy, compiles=True, max_rounds=PEER_ROUNDS),
    Contestant("TRL chunked log-probs", "trl", _trl, max_rounds=SLOW_ROUNDS),
    Contestant("F.linear_cross_entropy", "torch", _torch_linear_cross_entropy, max_rounds=SLOW_ROUNDS),
]


def our_contestants(backends: Sequence[str]) -> list[Contestant[LinearBatch]]:
    return [
        Contestant(f"linear_gtpo_loss, {backend}", backend, partial(_with_backend, backend)) for backend in backends
    ]


CPU_BACKENDS = ("cpp", "torch")
CONTESTANTS = [*FLOORS, *our_contestants(CPU_BACKENDS), EAGER, *PEERS]


@dataclass(frozen=True)
class Plan:
    """One shape of the table.

    limits: mask fraction -> the most that `cpp` may take, in units of the float32 floor with its own allocations.
    peers_at: mask fractions at which the peers are measured too; eager always is.
    """

    num_rows: int
    vocab: int
    width: int
    limits: dict[float, float]
    peers_at: tuple[float, ...] = ()
    dtype: torch.dtype = torch.float32
    rounds: int = 5

    def most_extra_mib(self) -> float:
        """Gradients and max(32 MiB, 256 V floats) beside them; with bfloat16 inputs a float32 copy of the weight."""
        gradients = (self.num_rows + self.vocab) * self.width * 4 / MIB
        if self.dtype == torch.bfloat16:
            return 170.0
        return gradients + max(32.0, 256 * self.vocab * 4 / MIB)


PLANS = [
    Plan(2048, 32768, 512, {0.0: 1.08, 0.3: 0.76, 0.6: 0.45}, peers_at=(0.0, 0.3)),
    Plan(4096, 49152, 576, {0.0: 1.12}, rounds=3),
    Plan(1024, 151936, 896, {0.0: 0.90}, rounds=3),
    Plan(2048, 32768, 512, {0.0: 1.2}, peers_at=(0.0,), dtype=torch.bfloat16),
]
SMOKE_PLANS = [
    Plan(64, 257, 32, {0.0: 1.08, 0.3: 0.76}, peers_at=(0.0, 0.3)),
    Plan(64, 257, 32, {0.0: 1.2}, peers_at=(0.0,), dtype=torch.bfloat16),
]
SMOKE_SHAPE = (64, 257, 32)


def measure_plan(plan: Plan, mask_fraction: float, rounds: int) -> list[Row]:
    shape = {"N": plan.num_rows, "V": plan.vocab, "D": plan.width}
    dtype = str(plan.dtype).removeprefix("torch.")

    def row(name: str, backend: str) -> Row:
        return Row(name, backend, shape, dtype, mask_fraction)

    batch = make_batch(*shape.values(), mask_fraction=mask_fraction, dtype=plan.dtype)
    others = [EAGER, *(PEERS if mask_fraction in plan.peers_at else ())]
    contestants = [*FLOORS, *our_contestants(CPU_BACKENDS), *others]
    if plan.dtype != torch.float32:
        # the gates are in units of the float32 floor; with matrix tiles the products in bfloat16 lie far below it
        plain = make_batch(*shape.values(), mask_fraction=mask_fraction)
        contestants[:0] = [
            Contestant(f.name + ", float32", f.backend, lambda _, prepare=f.prepare: prepare(plain)) for f in FLOORS
        ]
    rows = compare(
        contestants,
        batch,
        exact_outputs(batch),
        row,
        allowed=ALLOWED_ERROR[plan.dtype],
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_batch(*SMOKE_SHAPE, mask_fraction=mask_fraction, dtype=plan.dtype),
    )
    set_ratios(rows, rows[0].cpu_s)
    set_ratios(rows, rows[1].cpu_s, "x ready floor")
    return rows


def judge(plan: Plan, mask_fraction: float, rows: Sequence[Row]) -> None:
    """The gates of the `cpp` backend; a figure that is missing fails."""
    line = find(rows, "linear_gtpo_loss, cpp")
    limit, most = plan.limits[mask_fraction], plan.most_extra_mib()
    line.gate(f"CPU <= {limit} x floor", (line.ratio_to_floor or float("inf")) <= limit)
    line.gate(f"memory <= {most:.0f} MiB", line.extra_mb is not None and line.extra_mb <= most)
    if plan.dtype == torch.bfloat16:
        theirs = find(rows, EAGER.name).errors
        ours = [line.errors.get(name, float("inf")) <= theirs[name] for name in ("d_hidden", "d_weight")]
        line.gate("gradient error <= eager's", all(ours))


CAPTION = """linear_gtpo_loss, forward + backward with d_weight.  CPU ms: of all threads; medians of interleaved rounds.
extra MiB: peak above what was held before, gradients included.  x floor: CPU time over that of the three products over
all rows in float32, outputs allocated; x ready floor: the same into ready tensors.
errors: loss, d_hidden, d_weight, relative to float64."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    rows: list[Row] = []
    with smoke_run(options.smoke):
        for plan in SMOKE_PLANS if options.smoke else PLANS:
            for mask_fraction in plan.limits:
                measured = measure_plan(plan, mask_fraction, rounds=1 if options.smoke else plan.rounds)
                if not options.smoke:
                    judge(plan, mask_fraction, measured)
                rows += measured
    publish("bench-linear", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
