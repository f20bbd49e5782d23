"""The `torch` backend of the fused losses: forward turns each chunk of logits into its gradient in place (6NVD).

The slope d loss / d logprob of a token needs that row's softmax and a denominator that is known before, so no second
projection is needed: logits -> softmax -> slope -> d_logits -> d_hidden and d_weight, a chunk at a time.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.kernel_torch import clipped_loss, loss_slope
from gtpo_kernels.clipped_loss.reference import loss_denominator
from gtpo_kernels.gtpo_loss.reference import GradientFilter, LossInputs
from gtpo_kernels.token_logprobs.kernel_torch import Head, LogitScale, row_blocks, row_softmax_

# Columns of a block that `filter_eps` keeps or leaves out of the gradient products as a whole.
FILTER_COLUMNS = 256


class Slopes(Protocol):
    """What is known of a pass once its slopes are."""

    scale: LogitScale

    def slope(self, rows: Tensor) -> Tensor:
        """d loss / d logprob of `rows`."""


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


# sweep_(logits [n, V], rows [n], state, gradient): stores log-probability and entropy of `rows` in the state.  The
# logits, contiguous and in the accumulator dtype, become d_logits if `gradient`, else are spent.
Sweep = Callable[[Tensor, Tensor, LossPass, bool], None]


def sweep_(logits: Tensor, rows: Tensor, state: LossPass, gradient: bool) -> None:
    """The `Sweep` of this backend."""
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
    silent = torch.ones_like(inputs.loss_mask).index_fill_(0, state.active_rows, False)
    logits.index_fill_(0, silent.nonzero().squeeze(1), 0.0)
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


def linear_gtpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    chunk_rows: int | None,
    needs: tuple[bool, bool, bool],
    gradient_filter: GradientFilter,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], d_hidden [N, D], d_weight [V, D], d_bias [V]).

    Gradients are in the accumulator dtype, [0] where not needed.
    """
    return chunked_linear_loss(Head(hidden, weight, bias, chunk_rows), inputs, needs, gradient_filter, sweep_)


def chunked_linear_loss(
    head: Head,
    inputs: LossInputs,
    needs: tuple[bool, bool, bool],
    gradient_filter: GradientFilter,
    sweep_: Sweep,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_gtpo_loss` of any backend: project a chunk of rows, sweep it, add it to the gradients."""
    head.allocate_gradients(*needs)
    state = LossPass(inputs, head.dtype)
    for rows, hidden, logits in head.chunks(state.active_rows):
        sweep_(logits, rows, state, any(needs))
        if any(needs):
            accumulate_filtered(head, rows, hidden, logits, state, gradient_filter)
    for rows, _, logits in head.chunks(state.forward_only_rows):
        sweep_(logits, rows, state, False)
    return *state.finish(), *head.gradients()


def accumulate_filtered(
    head: Head, rows: Tensor, hidden: Tensor, d_logits: Tensor, state: Slopes, gradient_filter: GradientFilter
) -> None:
    """`head.accumulate`, less the rows and the vocabulary blocks that the filter leaves out."""
    if gradient_filter.skip_clipped:
        kept = (state.slope(rows) != 0).nonzero().squeeze(1)
        if len(kept) < len(rows):
            rows, hidden = rows[kept], hidden[kept]
            # in the layout of the buffer: a transposing copy takes as long as what it saves
            d_logits = d_logits.t().index_select(1, kept).t() if head.by_column else d_logits.index_select(0, kept)
    if gradient_filter.filter_eps == 0.0:
        head.accumulate(rows, hidden, d_logits)
        return
    scale = state.scale.divide_(state.slope(rows).abs(), rows)
    head.accumulate(rows, hidden, d_logits, _column_runs(d_logits, scale, gradient_filter.filter_eps))


def _column_runs(d_logits: Tensor, scale: Tensor, filter_eps: float) -> list[slice]:
    """Runs of the column blocks in which some row has sum |d_logits| > filter_eps * scale [n]."""
    vocab = d_logits.shape[1]
    mass = torch.stack([block.abs().sum(dim=1) for block in d_logits.split(FILTER_COLUMNS, dim=1)])
    # a NaN is kept
    kept = (~(mass <= filter_eps * scale)).any(dim=1).tolist()
    starts = [i for i, keep in enumerate(kept) if keep and not (i and kept[i - 1])]
    ends = [i + 1 for i, keep in enumerate(kept) if keep and not (i + 1 < len(kept) and kept[i + 1])]
    return [
        slice(start * FILTER_COLUMNS, min(end * FILTER_COLUMNS, vocab)) for start, end in zip(starts, ends, strict=True)
    ]
