"""The `cpp` backend of the per-token ops: compiled sweeps over rows of logits, on the CPU.

The logits of a chunk of hidden states lie in memory as [V, n]: so the products with the head are fastest, and the sweep
works on a vector of neighbouring rows at a time.
"""

import torch
from torch import Tensor

from gtpo_kernels import _cpu
from gtpo_kernels.token_logprobs.kernel_torch import (
    Head,
    RowSweeps,
    chunked_gradients,
    chunked_statistics,
    empty_statistics,
    rows_with_gradient,
    zero_other_rows_,
)
from gtpo_kernels.token_logprobs.reference import RowStatistics
from gtpo_kernels.turn_advantages.kernel_cpp import buffer, buffer_or_none

LOGIT_TYPES = {
    torch.float32: _cpu.LogitType.float32,
    torch.bfloat16: _cpu.LogitType.bfloat16,
    torch.float64: _cpu.LogitType.float64,
}


def logits_in_memory(logits: Tensor) -> _cpu.Logits:
    """Where the compiled sweep finds logits [n, V]; the caller keeps them alive."""
    return _cpu.Logits(
        data=logits.data_ptr(),
        type=LOGIT_TYPES[logits.dtype],
        num_rows=logits.shape[0],
        vocab=logits.shape[1],
        row_stride=logits.stride(0),
        # that of a single column is arbitrary
        vocab_stride=logits.stride(1) if logits.shape[1] > 1 else 1,
    )


def sweepable(logits: Tensor) -> Tensor:
    """The logits, or a copy of them where they are of another dtype or layout than the sweep reads."""
    return logits.to(logits.dtype if logits.dtype in LOGIT_TYPES else torch.float32).contiguous()


def temperatures(rows: Tensor, temperature: float, row_temperature: Tensor | None) -> Tensor | None:
    """Of the wanted rows, [n] float64; None where all are 1."""
    if row_temperature is not None:
        return row_temperature[rows].double()
    if temperature == 1.0:
        return None
    return torch.full((len(rows),), temperature, dtype=torch.float64, device=rows.device)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float
) -> RowStatistics:
    """Statistics of every row of logits [N, V]."""
    statistics = empty_statistics(logits)
    rows = torch.arange(len(logits), device=logits.device)
    store_statistics(sweepable(logits), None, rows, targets, temperature, row_temperature, softcap, statistics)
    return statistics


def store_statistics(
    logits: Tensor,
    logit_rows: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    statistics: RowStatistics,
) -> None:
    """Sweep rows of logits and write the statistics of `rows`, the rows of the batch that they are."""
    swept = _cpu.token_statistics(
        logits_in_memory(logits),
        buffer_or_none(logit_rows, torch.int64),
        buffer(targets[rows], torch.int64),
        buffer_or_none(temperatures(rows, temperature, row_temperature), torch.float64),
        softcap=softcap,
        num_threads=torch.get_num_threads(),
    )
    for whole, part in zip(statistics, torch.from_numpy(swept).unbind(1), strict=True):
        whole[rows] = part.to(whole.dtype)


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
    x = sweepable(logits)
    d_logits = x if in_place else torch.zeros_like(x)
    rows = rows_with_gradient(grad_logprobs, grad_entropy)
    turn_into_d_logits(
        x, d_logits, rows, rows, targets, temperature, row_temperature, softcap, grad_logprobs, grad_entropy
    )
    if not in_place:
        return d_logits.to(logits.dtype)
    zero_other_rows_(d_logits, rows)
    return logits if d_logits is logits else logits.copy_(d_logits)


def turn_into_d_logits(
    logits: Tensor,
    d_logits: Tensor,
    logit_rows: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    softcap: float,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """d_logits of what flows back to the statistics of `rows`, written beside or over the logits."""
    _cpu.token_gradient(
        logits_in_memory(logits),
        logits_in_memory(d_logits),
        buffer_or_none(logit_rows, torch.int64),
        buffer(targets[rows], torch.int64),
        buffer_or_none(temperatures(rows, temperature, row_temperature), torch.float64),
        softcap=softcap,
        grad_logprobs=buffer(grad_logprobs[rows], torch.float64),
        grad_entropy=None if grad_entropy is None else buffer(grad_entropy[rows], torch.float64),
        num_threads=torch.get_num_threads(),
    )


def row_sweeps(targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float) -> RowSweeps:
    """The sweeps of this backend."""
    scale = (targets, temperature, row_temperature, softcap)

    def write_statistics(logits: Tensor, rows: Tensor, statistics: RowStatistics, keep_logits: bool) -> None:
        store_statistics(logits, None, rows, *scale, statistics)

    def gradient_(
        logits: Tensor, rows: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, statistics: RowStatistics
    ) -> None:
        turn_into_d_logits(logits, logits, None, rows, *scale, grad_logprobs, grad_entropy)

    return RowSweeps(write_statistics, gradient_, by_column=True, reads_statistics=False)


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
    sweeps = row_sweeps(targets, temperature, row_temperature, softcap)
    return chunked_statistics(Head(hidden, weight, bias, chunk_rows, sweeps.by_column), sweeps)


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
    head = Head(hidden, weight, bias, chunk_rows, sweeps.by_column)
    return chunked_gradients(head, needs, sweeps, grad_logprobs, grad_entropy)
