"""The `torch` backend of the fused losses: logits -> softmax -> slope -> d_logits, in place, a block of rows at a time.

The slope d loss / d logprob of a token needs that row's softmax and a denominator that is known before, nothing else.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.kernel_torch import clipped_loss, loss_slope
from gtpo_kernels.clipped_loss.reference import loss_denominator
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_torch import LogitScale, row_blocks, row_softmax_, zero_other_rows_


class LossPass:
    """One pass over the rows: which of them run, what they need, and the per-row results that loss and metrics need.

    active_rows: to be turned into gradients.  forward_only_rows: counted by the metrics alone.
    denominator: of the loss [].  logprobs, entropy: [N], written by the sweep, 0 for rows that it does not see.
    """

    def __init__(self, inputs: LossInputs, dtype: torch.dtype) -> None:
        mask = inputs.loss_mask
        self.inputs = inputs
        self.dtype = dtype
        self.scale = LogitScale(inputs.temperature, inputs.row_temperature, inputs.softcap)
        self.denominator = loss_denominator(inputs.num_loss_tokens, mask, dtype)
        self.logprobs = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        self.entropy = torch.zeros_like(self.logprobs)

    # found when they are asked for: on a GPU that waits for the device
    @cached_property
    def active_rows(self) -> Tensor:
        return (self.inputs.loss_mask & (self.inputs.advantages != 0)).nonzero().squeeze(1)

    @cached_property
    def forward_only_rows(self) -> Tensor:
        if not self.inputs.all_metrics:
            return self.active_rows[:0]
        return (self.inputs.loss_mask & (self.inputs.advantages == 0)).nonzero().squeeze(1)

    def slope(self, rows: Tensor) -> Tensor:
        """d loss / d logprob of `rows`, once their log-probabilities are known."""
        inputs = self.inputs
        return loss_slope(
            self.logprobs[rows],
            inputs.advantages[rows].to(self.dtype),
            None if inputs.old_logprobs is None else inputs.old_logprobs[rows].to(self.dtype),
            self.denominator,
            inputs.terms.clip_low,
            inputs.terms.clip_high,
        )

    def finish(self, clipped_loss: Callable[..., tuple[Tensor, ...]] = clipped_loss) -> tuple[Tensor, Tensor]:
        """(loss [], metrics [11]) from the per-row results.  clipped_loss: the kernel that makes them."""
        i = self.inputs
        loss, metrics, _ = clipped_loss(
            self.logprobs,
            i.advantages,
            i.loss_mask,
            i.old_logprobs,
            self.entropy,
            i.num_loss_tokens,
            i.terms.clip_low,
            i.terms.clip_high,
            i.all_metrics,
            False,
        )
        return loss, metrics


class ChunkSweep(NamedTuple):
    """What a backend does with a chunk of logits [n, V], those of `rows` [n] of the batch.

    inputs: of the pass, as the sweep reads them.
    sweep_(logits, rows, state, gradient): stores log-probability and entropy of `rows` in the state.  The logits,
        in the accumulator dtype, become d_logits if `gradient`, else are spent.
    by_column: the logits are the columns of a buffer [V, n].
    """

    inputs: LossInputs
    sweep_: Callable[[Tensor, Tensor, LossPass, bool], None]
    by_column: bool = False


def chunk_sweep(inputs: LossInputs) -> ChunkSweep:
    """The `ChunkSweep` of this backend."""
    return ChunkSweep(inputs, sweep_)


def sweep_(logits: Tensor, rows: Tensor, state: LossPass, gradient: bool) -> None:
    """See `ChunkSweep`."""
    for block in row_blocks(logits):
        x, block_rows = logits[block], rows[block]
        targets = state.inputs.targets[block_rows].long()
        cap_slope = state.scale.apply_(x, block_rows, gradient)
        softmax = row_softmax_(x, targets)
        state.logprobs[block_rows] = softmax.logprobs
        state.entropy[block_rows] = softmax.entropy
        if gradient:
            slope = state.scale.divide_(state.slope(block_rows), block_rows)
            torch.mul(softmax.weights, (-slope * softmax.inverse_sum)[:, None], out=x)
            x.scatter_add_(1, targets[:, None], slope[:, None])
            if cap_slope is not None:
                x.mul_(cap_slope)


def gtpo_loss(logits: Tensor, inputs: LossInputs, need_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    d_logits = logits.new_zeros(logits.shape if need_logits else (0,))
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    for rows, d_rows in _swept_blocks(logits, state, need_logits):
        d_logits[rows] = d_rows.to(logits.dtype)
    return *state.finish(), d_logits


def gtpo_loss_(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]); logits [N, V], contiguous, become d_logits."""
    state = LossPass(inputs, accumulator_dtype(logits.dtype))
    for rows, d_rows in _swept_blocks(logits, state, True):
        logits[rows] = d_rows.to(logits.dtype)
    zero_other_rows_(logits, state.active_rows)
    return state.finish()


def _swept_blocks(logits: Tensor, state: LossPass, gradient: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Sweep a copy of the logits a block at a time; yields (rows, their d_logits in the accumulator dtype)."""
    for every, needed in ((state.active_rows, gradient), (state.forward_only_rows, False)):
        for block in row_blocks(logits, len(every)):
            rows = every[block]
            x = logits[rows].to(state.dtype)
            sweep_(x, rows, state, needed)
            if needed:
                yield rows, x
