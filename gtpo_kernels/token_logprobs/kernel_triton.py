"""The `triton` backend of the per-token ops, for NVIDIA and AMD GPUs.

From logits, each op is a sweep over their rows.  From hidden states the forward pass is one tile kernel that never
writes a logit; the backward pass projects chunks with the library's matrix products.
"""

import torch
from torch import Tensor

from gtpo_kernels.token_logprobs.kernel_torch import (
    Head,
    RowSweeps,
    chunked_gradients,
    chunked_statistics,
    empty_statistics,
)
from gtpo_kernels.token_logprobs.kernel_triton_sweeps import adjacent_columns, sweep_gradient, sweep_statistics
from gtpo_kernels.token_logprobs.kernel_triton_tile import tile_statistics
from gtpo_kernels.token_logprobs.reference import RowStatistics, head_dtype
from gtpo_kernels.triton_math import contiguous, row_scaling


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float
) -> RowStatistics:
    """Statistics of every row of logits [N, V]."""
    statistics = empty_statistics(logits)
    scale = row_scaling(temperature, row_temperature, softcap)
    sweep_statistics(adjacent_columns(logits), None, None, targets.contiguous(), scale, statistics)
    return statistics


def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    statistics: RowStatistics,
    in_place: bool = False,
) -> Tensor:
    """d_logits [N, V] in the logits' dtype; in the memory of the logits, which are contiguous then, if `in_place`."""
    d_logits = logits if in_place else torch.empty_like(logits, memory_format=torch.contiguous_format)
    scale = row_scaling(temperature, row_temperature, softcap)
    upstream = grad_logprobs.contiguous(), contiguous(grad_entropy)
    sweep_gradient(adjacent_columns(logits), d_logits, None, targets.contiguous(), scale, *upstream, statistics)
    return d_logits


def row_sweeps(targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float) -> RowSweeps:
    """The sweeps of this backend."""
    targets = targets.contiguous()
    scale = row_scaling(temperature, row_temperature, softcap)

    def write_statistics(logits: Tensor, rows: Tensor, statistics: RowStatistics, keep_logits: bool) -> None:
        sweep_statistics(logits, rows, None, targets, scale, statistics)

    def gradient_(
        logits: Tensor, rows: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, statistics: RowStatistics
    ) -> None:
        upstream = grad_logprobs.contiguous(), contiguous(grad_entropy)
        sweep_gradient(logits, logits, rows, targets, scale, *upstream, statistics)

    return RowSweeps(write_statistics, gradient_)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    chunk_rows: int | None,
) -> RowStatistics:
    """Statistics of every row of hidden @ weight.T + bias."""
    if head_dtype(hidden, weight, bias) == torch.float64:
        sweeps = row_sweeps(targets, temperature, row_temperature, softcap)
        return chunked_statistics(Head(hidden, weight, bias, chunk_rows), sweeps)
    scale = row_scaling(temperature, row_temperature, softcap)
    statistics = empty_statistics(hidden)
    tile_statistics(hidden, weight, bias, targets.contiguous(), scale, statistics)
    return statistics


def linear_token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    chunk_rows: int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]), [0] where not needed; the logits are projected anew."""
    sweeps = row_sweeps(targets, temperature, row_temperature, softcap)
    return chunked_gradients(Head(hidden, weight, bias, chunk_rows), needs, sweeps, grad_logprobs, grad_entropy)
