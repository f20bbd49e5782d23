"""The `torch` backend of the fused losses: forward turns each chunk of logits into its gradient in place (6NVD).

The slope d loss / d logprob of a token needs that row's softmax and a denominator that is known before, so no second
projection is needed: logits -> softmax -> slope -> d_logits -> d_hidden and d_weight, a chunk at a time.
"""

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.kernel_torch import clipped_loss, loss_slope
from gtpo_kernels.clipped_loss.reference import loss_denominator
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_torch import Head, Temperature, row_blocks, row_softmax_


class LossPass:
    """One pass over the rows: what turns logits into gradients, and the per-row results that loss and metrics need."""

    def __init__(self, inputs: LossInputs, dtype: torch.dtype) -> None:
        mask, advantages = inputs.loss_mask, inputs.advantages
        self.inputs = inputs
        self.dtype = dtype
        self.temperature = Temperature(inputs.temperature, inputs.row_temperature)
        self.denominator = loss_denominator(inputs.num_loss_tokens, mask, dtype)
        self.active_rows = (mask & (advantages != 0)).nonzero().squeeze(1)
        silent = mask & (advantages == 0) if inputs.all_metrics else torch.zeros_like(mask)
        self.forward_only_rows = silent.nonzero().squeeze(1) if inputs.all_metrics else self.active_rows[:0]
        self.logprobs = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        self.entropy = torch.zeros_like(self.logprobs)

    def run_block_(self, x: Tensor, rows: Tensor, gradient: bool) -> None:
        """x [n, V]: the logits of `rows`, whose results are kept; x becomes d_logits if `gradient`, else is spent."""
        inputs = self.inputs
        targets = inputs.targets[rows].long()
        softmax = row_softmax_(self.temperature.divide_(x, rows), targets)
        self.logprobs[rows] = softmax.logprobs
        self.entropy[rows] = softmax.entropy
        if not gradient:
            return
        old = None if inputs.old_logprobs is None else inputs.old_logprobs[rows].to(self.dtype)
        slope = loss_slope(
            softmax.logprobs,
            inputs.advantages[rows].to(self.dtype),
            old,
            self.denominator,
            inputs.clip_low,
            inputs.clip_high,
        )
        self.temperature.divide_(slope, rows)
        torch.mul(softmax.weights, (-slope * softmax.inverse_sum)[:, None], out=x)
        x.scatter_add_(1, targets[:, None], slope[:, None])

    def finish(self) -> tuple[Tensor, Tensor]:
        """(loss [], metrics [11]) from the per-row results, by the one definition."""
        i = self.inputs
        loss, metrics, _ = clipped_loss(
            self.logprobs,
            i.advantages,
            i.loss_mask,
            i.old_logprobs,
            self.entropy,
            i.num_loss_tokens,
            i.clip_low,
            i.clip_high,
            i.all_metrics,
            False,
        )
        return loss, metrics


def gtpo_loss(logits: Tensor, inputs: LossInputs, need_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    accumulator = accumulator_dtype(logits.dtype)
    state = LossPass(inputs, accumulator)
    d_logits = logits.new_zeros(logits.shape if need_logits else (0,))
    for every, gradient in ((state.active_rows, need_logits), (state.forward_only_rows, False)):
        for block in row_blocks(logits, len(every)):
            rows = every[block]
            x = logits[rows].to(accumulator)
            state.run_block_(x, rows, gradient)
            if gradient:
                d_logits[rows] = x.to(logits.dtype)
    return *state.finish(), d_logits


def linear_gtpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    chunk_rows: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_hidden [N, D], d_weight [V, D], d_bias [V]).

    Gradients are in the accumulator dtype, [0] where not needed.
    """
    head = Head(hidden, weight, bias, chunk_rows)
    head.allocate_gradients(*needs)
    state = LossPass(inputs, head.dtype)
    for every, gradient in ((state.active_rows, any(needs)), (state.forward_only_rows, False)):
        for chunk, hidden_rows, logits in head.chunks(every):
            for block in row_blocks(logits):
                state.run_block_(logits[block], chunk[block], gradient)
            if gradient:
                head.accumulate(chunk, hidden_rows, logits)
    return *state.finish(), head.d_hidden, head.d_weight, head.d_bias
