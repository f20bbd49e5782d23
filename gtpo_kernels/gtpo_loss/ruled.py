"""The fused losses of any `LossRule`: statistics of rows, the slopes of their tokens, d_logits; on every backend.

The sweeps are those of the backend's per-token op, the slopes those of `clipped_loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.backend import run_kernel
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.clipped_loss.reference import (
    active_tokens,
    clipped_loss_reference,
    counted_tokens,
    loss_denominator,
    pack_metrics,
)
from gtpo_kernels.clipped_loss.ruled import ruled_slopes, token_slopes
from gtpo_kernels.gtpo_loss.reference import LossInputs
from gtpo_kernels.token_logprobs.kernel_torch import LogitScale
from gtpo_kernels.token_logprobs.reference import RowStatistics


class RuledPass:
    """Per-row results of one pass, all [N]: statistics of the rows, and what flows back to them."""

    def __init__(self, inputs: LossInputs, dtype: torch.dtype) -> None:
        mask = inputs.loss_mask

        def zeros() -> Tensor:
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device)

        self.inputs = inputs
        self.dtype = dtype
        self.scale = LogitScale(inputs.temperature, inputs.row_temperature, inputs.softcap)
        self.denominator = loss_denominator(inputs.num_loss_tokens, mask, dtype)
        self.statistics = RowStatistics(zeros(), zeros(), zeros(), zeros())
        self.d_logprobs = zeros()
        self.d_entropy = zeros() if inputs.terms.entropy_coef else None
        active = active_tokens(inputs.advantages, mask, inputs.terms)
        counted = counted_tokens(inputs.advantages, mask, inputs.terms, inputs.all_metrics)
        self.active_rows = active.nonzero().squeeze(1)
        self.forward_only_rows = (counted & ~active).nonzero().squeeze(1)

    def find_slopes(self, rows: Tensor) -> None:
        """Of rows whose log-probabilities are known, each with a ratio of its own."""
        i = self.inputs
        of_logprobs, of_entropy = token_slopes(
            self.statistics.logprobs[rows],
            i.advantages[rows].to(self.dtype),
            None if i.old_logprobs is None else i.old_logprobs[rows].to(self.dtype),
            self.denominator,
            i.terms.of_rows(rows),
        )
        self.d_logprobs[rows] = of_logprobs
        if self.d_entropy is not None and of_entropy is not None:
            self.d_entropy[rows] = of_entropy

    def find_all_slopes(self) -> None:
        """Of all rows, once the log-probabilities of the active ones are known."""
        i = self.inputs
        self.d_logprobs, self.d_entropy = ruled_slopes(
            self.statistics.logprobs, i.advantages, i.loss_mask, i.old_logprobs, i.num_loss_tokens, i.terms
        )

    def slope(self, rows: Tensor) -> Tensor:
        """d loss / d logprob of `rows`."""
        return self.d_logprobs[rows]

    def finish(self) -> tuple[Tensor, Tensor]:
        """(loss [], metrics [13])."""
        i, of_rows = self.inputs, self.statistics
        tokens = (of_rows.logprobs, i.advantages, i.loss_mask, i.old_logprobs, of_rows.entropy)
        loss, metrics = clipped_loss_reference(*tokens, i.num_loss_tokens, i.terms, i.all_metrics)
        return loss, pack_metrics(loss, metrics)


class TokenArguments(NamedTuple):
    """What the per-token op of a backend takes beside logits."""

    targets: Tensor
    temperature: float
    row_temperature: Tensor | None
    softcap: float


def _whole_pass(backend: str, logits: Tensor, inputs: LossInputs) -> RuledPass:
    """Statistics and slopes of logits that are there."""
    state = RuledPass(inputs, accumulator_dtype(logits.dtype))
    arguments = token_arguments(inputs)
    kept = run_kernel("token_logprobs", backend, "token_logprobs", logits.device, logits, *arguments)
    state.statistics = RowStatistics(*kept)
    state.find_all_slopes()
    return state


def token_arguments(inputs: LossInputs) -> TokenArguments:
    """Of one pass; rows that are not computed hold a target and a temperature all the same."""
    i = inputs
    skipped = ~counted_tokens(i.advantages, i.loss_mask, i.terms, i.all_metrics)
    temperature = None if i.row_temperature is None else i.row_temperature.masked_fill(skipped, 1.0)
    return TokenArguments(i.targets.masked_fill(skipped, 0), i.temperature, temperature, i.softcap)


def ruled_gtpo_loss(
    backend: str, logits: Tensor, inputs: LossInputs, need_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [13], d_logits [N, V] in the logits' dtype, or [0] where not needed)."""
    state = _whole_pass(backend, logits, inputs)
    d_logits = _d_logits(backend, logits, state, in_place=False) if need_logits else logits.new_empty(0)
    return *state.finish(), d_logits


def ruled_gtpo_loss_(backend: str, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [13]); logits [N, V], contiguous, become d_logits."""
    state = _whole_pass(backend, logits, inputs)
    _d_logits(backend, logits, state, in_place=True)
    return state.finish()


def _d_logits(backend: str, logits: Tensor, state: RuledPass, *, in_place: bool) -> Tensor:
    """What the slopes of the pass make of all rows at once."""
    upstream = (state.d_logprobs, state.d_entropy)
    rest = (logits, *token_arguments(state.inputs), state.statistics, in_place)
    d_logits: Tensor = run_kernel("token_logprobs", backend, "token_logprobs_backward", logits.device, *upstream, *rest)
    return d_logits
