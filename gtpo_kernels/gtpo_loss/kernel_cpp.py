"""The `cpp` backend of the fused losses: a compiled sweep finds a row's softmax, its slope, and writes its d_logits."""

import torch
from torch import Tensor

from gtpo_kernels import _cpu
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.gtpo_loss.kernel_torch import ChunkSweep, LossPass
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_cpp import logits_in_memory, sweepable, temperatures
from gtpo_kernels.token_logprobs.kernel_torch import zero_other_rows_
from gtpo_kernels.turn_advantages.kernel_cpp import buffer, buffer_or_none


def sweep(logits: Tensor, d_logits: Tensor | None, logit_rows: Tensor | None, rows: Tensor, state: LossPass) -> None:
    """Store log-probability and entropy of `rows` in the state, and write d_logits, which may be the logits."""
    i = state.inputs
    swept = _cpu.gtpo_loss(
        logits_in_memory(logits),
        None if d_logits is None else logits_in_memory(d_logits),
        buffer_or_none(logit_rows, torch.int64),
        buffer(i.targets[rows], torch.int64),
        buffer_or_none(temperatures(rows, i.temperature, i.row_temperature), torch.float64),
        softcap=i.softcap,
        advantages=buffer(i.advantages[rows], torch.float64),
        old_logprobs=None if i.old_logprobs is None else buffer(i.old_logprobs[rows], torch.float64),
        denominator=state.denominator.item(),
        clip_low=i.terms.clip_low,
        clip_high=i.terms.clip_high,
        num_threads=torch.get_num_threads(),
    )
    logprobs, entropy, _, _ = torch.from_numpy(swept).unbind(1)
    state.logprobs[rows] = logprobs.to(state.dtype)
    state.entropy[rows] = entropy.to(state.dtype)


def sweep_(logits: Tensor, rows: Tensor, state: LossPass, gradient: bool) -> None:
    """See `ChunkSweep`."""
    sweep(logits, logits if gradient else None, None, rows, state)


def gtpo_loss(logits: Tensor, inputs: LossInputs, need_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    x = sweepable(logits)
    d_logits = x.new_zeros(x.shape if need_logits else (0,))
    _sweep_active_rows(x, d_logits if need_logits else None, state)
    return *state.finish(), d_logits.to(logits.dtype)


def gtpo_loss_(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]); logits [N, V], contiguous, become d_logits."""
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    x = sweepable(logits)
    _sweep_active_rows(x, x, state)
    zero_other_rows_(x, state.active_rows)
    if x is not logits:
        logits.copy_(x)
    return state.finish()


def _sweep_active_rows(logits: Tensor, d_logits: Tensor | None, state: LossPass) -> None:
    # first, because d_logits may take the place of these logits
    sweep(logits, None, state.forward_only_rows, state.forward_only_rows, state)
    sweep(logits, d_logits, state.active_rows, state.active_rows, state)


def chunk_sweep(inputs: LossInputs) -> ChunkSweep:
    """The `ChunkSweep` of this backend."""
    return ChunkSweep(inputs, sweep_, by_column=True)
