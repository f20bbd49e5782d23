"""The `cuda` backend of the per-token ops: one compiled sweep over the logits, forward and backward."""

import torch
from torch import Tensor

from gtpo_kernels import _cuda
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.cuda_launch import address, dtype_of, launch, packed
from gtpo_kernels.token_logprobs.kernel_torch import (
    Head,
    LogitScale,
    RowSweeps,
    chunked_gradients,
    chunked_statistics,
    empty_statistics,
)
from gtpo_kernels.token_logprobs.reference import RowStatistics


class Operands:
    """Logits [n, V] with the targets [N] and the scale of their rows, as the compiled module takes them.

    It holds what it converted, so it must outlive the launch.
    """

    def __init__(self, logits: Tensor, rows: Tensor | None, targets: Tensor, scale: LogitScale) -> None:
        # a row may be a slice of something wider, but its elements are neighbours
        self.logits = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
        self.rows = rows
        self.targets = targets.long().contiguous()
        self.scale = scale
        self.row_temperature = packed(scale.row_temperature, accumulator_dtype(logits.dtype))

    def compiled(self) -> _cuda.Logits:
        return _cuda.Logits(
            dtype=dtype_of(self.logits),
            data=address(self.logits),
            stride=self.logits.stride(0),
            num_rows=self.logits.shape[0],
            vocab=self.logits.shape[1],
            rows=address(self.rows),
            targets=address(self.targets),
            temperature=self.scale.temperature,
            row_temperature=address(self.row_temperature),
            softcap=self.scale.softcap,
        )


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float
) -> RowStatistics:
    """Statistics of every row of logits [N, V]."""
    statistics = empty_statistics(logits)
    sweep(Operands(logits, None, targets, LogitScale(temperature, row_temperature, softcap)), statistics)
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
    operands = Operands(logits, None, targets, LogitScale(temperature, row_temperature, softcap))
    sweep_gradient(operands, statistics, grad_logprobs, grad_entropy, d_logits)
    return d_logits


def row_sweeps(targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float) -> RowSweeps:
    """The sweeps of this backend."""
    scale = LogitScale(temperature, row_temperature, softcap)

    def write_statistics(logits: Tensor, rows: Tensor, statistics: RowStatistics, keep_logits: bool) -> None:
        sweep(Operands(logits, rows, targets, scale), statistics)

    def gradient_(
        logits: Tensor, rows: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, statistics: RowStatistics
    ) -> None:
        sweep_gradient(Operands(logits, rows, targets, scale), statistics, grad_logprobs, grad_entropy, logits)

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
    sweeps = row_sweeps(targets, temperature, row_temperature, softcap)
    return chunked_statistics(Head(hidden, weight, bias, chunk_rows), sweeps)


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


def sweep(operands: Operands, statistics: RowStatistics) -> None:
    """Write the statistics of the operands' rows."""
    device = operands.logits.device
    launch(_cuda.token_logprobs, device, operands.compiled(), _cuda.RowStatistics(*map(address, statistics)))


def sweep_gradient(
    operands: Operands,
    statistics: RowStatistics,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    d_logits: Tensor,
) -> None:
    """Write d_logits [n, V], contiguous, which may be the logits themselves."""
    dtype = statistics.logprobs.dtype
    upstream = packed(grad_logprobs, dtype), packed(grad_entropy, dtype)
    kept = RowStatistics(*(x.contiguous() for x in statistics))
    launch(
        _cuda.token_logprobs_backward,
        d_logits.device,
        operands.compiled(),
        _cuda.RowStatistics(*map(address, kept)),
        grad_logprobs=address(upstream[0]),
        grad_entropy=address(upstream[1]),
        d_logits=address(d_logits),
    )
