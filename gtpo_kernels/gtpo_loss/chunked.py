"""`linear_gtpo_loss` of every backend: project a chunk of rows, sweep it, add it to the gradients.

A backend brings the sweeps: `chunk_sweep` for the clipped surrogate, `row_sweeps` of its per-token op for other rules.
"""

from typing import Protocol

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel
from gtpo_kernels.gtpo_loss.kernel_torch import ChunkSweep, LossPass
from gtpo_kernels.gtpo_loss.reference import GradientFilter, LossInputs
from gtpo_kernels.gtpo_loss.ruled import RuledPass, token_arguments
from gtpo_kernels.token_logprobs.kernel_torch import Head, LogitScale, RowSweeps

# Columns of a block that `filter_eps` keeps or leaves out of the gradient products as a whole.
FILTER_COLUMNS = 256

Needs = tuple[bool, bool, bool]
LossAndGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def chunked_linear_loss(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: LossInputs,
    chunk_rows: int | None,
    needs: Needs,
    gradient_filter: GradientFilter,
) -> LossAndGradients:
    """(loss [], metrics [11], [13] of a rule that is not fused, d_hidden [N, D], d_weight [V, D], d_bias [V]).

    Gradients are in the accumulator dtype, [0] where not needed.
    """
    device = hidden.device
    with torch.autocast(device.type, enabled=False):
        if inputs.terms.is_clipped_surrogate:
            sweep: ChunkSweep = run_kernel("gtpo_loss", backend, "chunk_sweep", device, inputs)
            head = Head(hidden, weight, bias, chunk_rows, by_column=sweep.by_column)
            return _clipped_pass(head, sweep, needs, gradient_filter)
        sweeps: RowSweeps = run_kernel("token_logprobs", backend, "row_sweeps", device, *token_arguments(inputs))
        head = Head(hidden, weight, bias, chunk_rows, by_column=sweeps.by_column)
        return _ruled_pass(head, sweeps, inputs, needs, gradient_filter)


def _clipped_pass(head: Head, sweep: ChunkSweep, needs: Needs, gradient_filter: GradientFilter) -> LossAndGradients:
    """One projection of each chunk (6NVD): its logits become d_logits at once."""
    head.allocate_gradients(*needs)
    state = LossPass(sweep.inputs, head.dtype)
    for rows, hidden, logits in head.chunks(state.active_rows):
        sweep.sweep_(logits, rows, state, any(needs))
        if any(needs):
            _accumulate(head, rows, hidden, logits, state, gradient_filter)
    for rows, _, logits in head.chunks(state.forward_only_rows):
        sweep.sweep_(logits, rows, state, False)
    return *state.finish(), *head.gradients()


def _ruled_pass(
    head: Head, sweeps: RowSweeps, inputs: LossInputs, needs: Needs, gradient_filter: GradientFilter
) -> LossAndGradients:
    """One projection of each chunk, swept twice (6NVD), unless tokens share a ratio.

    Then all log-probabilities must be known before the first slope is, and each chunk is projected twice (8NVD).
    """
    head.allocate_gradients(*needs)
    state = RuledPass(inputs, head.dtype)

    def add_gradients(rows: Tensor, hidden: Tensor, logits: Tensor) -> None:
        sweeps.gradient_(logits, rows, state.d_logprobs, state.d_entropy, state.statistics)
        _accumulate(head, rows, hidden, logits, state, gradient_filter)

    in_one = inputs.terms.ratio_ids is None and any(needs)
    for rows, hidden_rows, logits in head.chunks(state.active_rows):
        sweeps.statistics(logits, rows, state.statistics, in_one)
        if in_one:
            state.find_slopes(rows)
            add_gradients(rows, hidden_rows, logits)
    if any(needs) and not in_one:
        state.find_all_slopes()
        for chunk in head.chunks(state.active_rows):
            add_gradients(*chunk)
    for rows, _, logits in head.chunks(state.forward_only_rows):
        sweeps.statistics(logits, rows, state.statistics, False)
    return *state.finish(), *head.gradients()


class Slopes(Protocol):
    """What is known of a pass once its slopes are."""

    scale: LogitScale

    def slope(self, rows: Tensor) -> Tensor:
        """d loss / d logprob of `rows`."""


def _accumulate(
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
