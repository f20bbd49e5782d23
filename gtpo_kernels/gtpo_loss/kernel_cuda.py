"""The `cuda` backend of the fused losses: a compiled sweep turns logits into their gradient, in place where asked to.

One launch a pass or chunk: a block whose row has no loss reads nothing, and writes zeros where a gradient is wanted.
"""

import torch
from torch import Tensor

from gtpo_kernels import _cuda
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.cuda_launch import address, launch, packed
from gtpo_kernels.gtpo_loss.kernel_torch import ChunkSweep, LossPass
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_cuda import Operands


def gtpo_loss(logits: Tensor, inputs: LossInputs, need_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    d_logits = logits.new_empty(logits.shape if need_logits else (0,))
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    _sweep(logits, None, state, d_logits if need_logits else None)
    return *state.finish(), d_logits


def gtpo_loss_(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]); logits [N, V], contiguous, become d_logits."""
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    _sweep(logits, None, state, logits)
    return state.finish()


def chunk_sweep(inputs: LossInputs) -> ChunkSweep:
    """The `ChunkSweep` of this backend."""
    return ChunkSweep(inputs, sweep_)


def sweep_(logits: Tensor, rows: Tensor, state: LossPass, gradient: bool) -> None:
    """See `ChunkSweep`."""
    _sweep(logits, rows, state, logits if gradient else None)


def _sweep(logits: Tensor, rows: Tensor | None, state: LossPass, d_logits: Tensor | None) -> None:
    inputs, dtype = state.inputs, state.dtype
    operands = Operands(logits, rows, inputs.targets, state.scale)
    mask = packed(inputs.loss_mask, torch.bool)
    advantages, old_logprobs = packed(inputs.advantages, dtype), packed(inputs.old_logprobs, dtype)
    launch(
        _cuda.gtpo_loss,
        logits.device,
        operands.compiled(),
        d_logits=address(d_logits),
        loss_mask=address(mask),
        advantages=address(advantages),
        old_logprobs=address(old_logprobs),
        denominator=address(state.denominator),
        clip_low=inputs.terms.clip_low,
        clip_high=inputs.terms.clip_high,
        all_metrics=inputs.all_metrics,
        logprobs=address(state.logprobs),
        entropy=address(state.entropy),
    )
