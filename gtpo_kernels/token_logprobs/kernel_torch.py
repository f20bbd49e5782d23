"""The `torch` backend of the per-token ops: rows in chunks, logits in place, no [N, V] but the caller's own.

The softmax of a row is kept as the pair (row_max, log_sum): log p = (x - row_max) - log_sum.  Their sum, the public
lse, has lost the small term at large logits, so it enters no gradient.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gtpo_kernels.backend import release_of
from gtpo_kernels.checks import accumulator_dtype
from gtpo_kernels.token_logprobs.reference import RowStatistics, head_dtype

# Elements of one elementwise block: on a CPU it and its exponentials stay in a core's cache; a GPU wants long launches.
BLOCK_ELEMENTS_CPU = 1 << 17
BLOCK_ELEMENTS_GPU = 1 << 26
# Bytes of the logits that are projected at once.
CHUNK_BYTES_CPU = 1 << 24
CHUNK_BYTES_GPU = 1 << 30
# Rows of a chunk whose logits are columns: fewer cost the products speed, more no longer pay.
MIN_CHUNK_COLUMNS = 240
MAX_CHUNK_COLUMNS = 2032
# Far below the logarithm of the smallest float64: exp() gives 0 as it does for -inf, but 0 * LOG_ZERO is 0, not NaN.
LOG_ZERO = -1e5
# The whole vocabulary as one run of columns.
EVERY = (slice(None),)


class RowSoftmax(NamedTuple):
    """The softmax of a block of rows.  Each [n] but `weights` [n, V] = exp(x - row_max), of row sum 1 / inverse_sum."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor
    weights: Tensor
    inverse_sum: Tensor


class RowSweeps(NamedTuple):
    """What a backend does with a chunk of logits [n, V], those of `rows` [n] of the batch; everything else is [N].

    statistics(logits, rows, statistics, keep_logits): writes the statistics of `rows`; may spend the logits.
    gradient_(logits, rows, grad_logprobs, grad_entropy, statistics): turns the logits into d_logits in place.
    by_column: the logits are the columns of a buffer [V, n].
    reads_statistics: whether gradient_ reads the statistics of its rows, or finds them anew.
    """

    statistics: Callable[[Tensor, Tensor, RowStatistics, bool], None]
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor | None, RowStatistics], None]
    by_column: bool = False
    reads_statistics: bool = True


class LogitScale(NamedTuple):
    """x = cap(logits) / temperature.  temperature: for all rows, or 1.0 where row_temperature [N] is given.

    softcap: cap(l) = softcap * tanh(l / softcap) for finite l; 0.0 for none.
    """

    temperature: float
    row_temperature: Tensor | None
    softcap: float

    def apply_(self, logits: Tensor, rows: Tensor | slice, gradient: bool = False) -> Tensor | None:
        """logits [n, V] of `rows` become x, in place.  d cap / d logits [n, V] if `gradient` and capped, else None."""
        slope = None
        if self.softcap:
            tanh = (logits / self.softcap).tanh_()
            if gradient:
                slope = torch.addcmul(logits.new_ones(()), tanh, tanh, value=-1)
            # an infinite logit is a mask, put on after the cap: it stays what it is
            torch.where(logits.isinf(), logits, tanh.mul_(self.softcap), out=logits)
        self.divide_(logits, rows)
        return slope

    def divide_(self, x: Tensor, rows: Tensor | slice) -> Tensor:
        """x [n, V] or [n] / temperature, in place.  rows: the rows of the batch that x holds."""
        if self.row_temperature is not None:
            divisor = self.row_temperature[rows].to(x.dtype)
            return x.div_(divisor if x.dim() == 1 else divisor[:, None])
        return x if self.temperature == 1.0 else x.div_(self.temperature)


def row_blocks(logits: Tensor, num_rows: int | None = None) -> Iterator[slice]:
    """0 .. num_rows, by default all rows of logits [N, V], in pieces of one elementwise block each."""
    rows, vocab = logits.shape
    num_rows = rows if num_rows is None else num_rows
    elements = BLOCK_ELEMENTS_CPU if logits.device.type == "cpu" else BLOCK_ELEMENTS_GPU
    step = max(1, elements // vocab)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def row_softmax_(x: Tensor, targets: Tensor) -> RowSoftmax:
    """The softmax of every row of x [n, V]; x itself becomes x - row_max, with LOG_ZERO for what lies below that."""
    row_max = x.amax(dim=1)
    # a row of all -inf must give -inf, not NaN, so the shift is 0 there
    dead = row_max == -float("inf")
    x.sub_(row_max.masked_fill(dead, 0.0)[:, None])
    target = x.gather(1, targets[:, None]).squeeze(1)
    weights = x.exp()
    sum_weights = weights.sum(dim=1).masked_fill(dead, 1.0)
    log_sum = sum_weights.log()
    x.clamp_(min=LOG_ZERO)
    entropy = log_sum - torch.linalg.vecdot(weights, x) / sum_weights
    return RowSoftmax(target - log_sum, entropy, row_max, log_sum, weights, sum_weights.reciprocal())


def empty_statistics(like: Tensor, dtype: torch.dtype | None = None) -> RowStatistics:
    """Room for the statistics of N rows.  like: [N, ...].  dtype: None for the accumulator dtype of `like`."""
    dtype = accumulator_dtype(like.dtype) if dtype is None else dtype
    return RowStatistics(*(like.new_empty(like.shape[0], dtype=dtype) for _ in range(4)))


def store_statistics(statistics: RowStatistics, rows: Tensor | slice, softmax: RowSoftmax) -> None:
    """Write a block's results to their rows."""
    for whole, part in zip(statistics, softmax[:4], strict=True):
        whole[rows] = part


def rows_with_gradient(grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Indices of the rows that something flows back to; the others are never read, whatever they hold."""
    flows = [grad != 0 for grad in (grad_logprobs, grad_entropy) if grad is not None]
    return torch.stack(flows).any(dim=0).nonzero().squeeze(1)


def turn_into_d_logits_(
    x: Tensor,
    rows: Tensor,
    targets: Tensor,
    scale: LogitScale,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    statistics: RowStatistics,
) -> None:
    """x [n, V]: the logits of `rows`, overwritten by (g (1[v = target] - p_v) - h p_v (log p_v + H)) / temperature.

    With a softcap, times its slope.  targets [n].  grad_logprobs (g), grad_entropy (h) and the statistics are [N].
    """
    slope = scale.apply_(x, rows, gradient=True)
    row_max, logprobs = statistics.row_max[rows], statistics.logprobs[rows]
    infinite = -float("inf")
    x.sub_(row_max.masked_fill(row_max == infinite, 0.0)[:, None]).sub_(statistics.log_sum[rows][:, None])
    g = scale.divide_(grad_logprobs[rows].to(x.dtype).masked_fill(logprobs == infinite, 0.0), rows)
    if grad_entropy is None:
        x.exp_().mul_(-g[:, None])
    else:
        h = scale.divide_(grad_entropy[rows].to(x.dtype), rows)
        p = x.exp()
        x.clamp_(min=LOG_ZERO).add_(statistics.entropy[rows][:, None]).mul_(-h[:, None]).sub_(g[:, None]).mul_(p)
    x.scatter_add_(1, targets[:, None], g[:, None])
    if slope is not None:
        x.mul_(slope)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float
) -> RowStatistics:
    """Statistics of every row of logits [N, V]."""
    targets = targets.long()
    scale = LogitScale(temperature, row_temperature, softcap)
    statistics = empty_statistics(logits)
    for rows in row_blocks(logits):
        x = logits[rows].to(statistics.logprobs.dtype, copy=True)
        scale.apply_(x, rows)
        store_statistics(statistics, rows, row_softmax_(x, targets[rows]))
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
    targets = targets.long()
    scale = LogitScale(temperature, row_temperature, softcap)
    d_logits = logits if in_place else torch.zeros_like(logits, memory_format=torch.contiguous_format)
    active = rows_with_gradient(grad_logprobs, grad_entropy)
    for block in row_blocks(logits, len(active)):
        rows = active[block]
        x = logits[rows].to(statistics.logprobs.dtype)
        turn_into_d_logits_(x, rows, targets[rows], scale, grad_logprobs, grad_entropy, statistics)
        d_logits[rows] = x.to(d_logits.dtype)
    if in_place:
        zero_other_rows_(d_logits, active)
    return d_logits


def zero_other_rows_(d_logits: Tensor, rows: Tensor) -> None:
    """Rows of d_logits [N, V] other than `rows` become 0."""
    others = torch.ones(len(d_logits), dtype=torch.bool, device=d_logits.device).index_fill_(0, rows, False)
    d_logits.index_fill_(0, others.nonzero().squeeze(1), 0.0)


def whole_vectors(num_rows: int) -> int:
    """num_rows rounded up to the columns that a sweep takes at once, column_multiple of csrc/row_kernels.h."""
    return 16 * -(-num_rows // 16)


def equal_chunks(num_rows: int, most: int) -> int:
    """Rows of a chunk, 1 to `most`, where as few chunks as possible share num_rows evenly."""
    num_chunks = max(1, -(-num_rows // most))
    return min(most, max(16, whole_vectors(-(-num_rows // num_chunks))))


def padded_columns(num_rows: int) -> int:
    """Columns of a buffer [V, n] for n >= num_rows: whole vectors, and neighbours in V never in the same cache set."""
    return 16 * (whole_vectors(num_rows) // 16 | 1)


def product_operands(device: torch.device, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype of a matrix product's operands: the inputs' own where a device adds their products in float32.

    Where it cannot, 16 bits are upcast, which on a GPU costs most of its speed: that is said once.
    """
    accumulator = accumulator_dtype(*dtypes)
    if device.type != "cuda" or len(set(dtypes)) > 1 or dtypes[0].itemsize != 2:
        return accumulator
    reason = why_upcast(dtypes[0])
    if reason is None:
        return dtypes[0]
    say_that_products_are_slow(f"{reason}: the head's products are in float32, about 12 times as slow")
    return accumulator


def why_upcast(dtype: torch.dtype) -> str | None:
    """Why products of 16-bit inputs cannot be added in float32 on a GPU; None where they can."""
    if dtype == torch.float16:
        return "a gradient over many tokens is below the range of float16, use bfloat16"
    if torch.version.hip is not None:
        return "torch has no product of bfloat16 with float32 results on ROCm"
    recent = release_of(torch.__version__) >= (2, 11)
    return None if recent else f"torch {torch.__version__} lacks out_dtype of mm and addmm, 2.11 has it"


@functools.cache
def say_that_products_are_slow(message: str) -> None:
    """Once for each message."""
    warnings.warn(message, stacklevel=2)


def multiply_(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out = left @ right, or out += left @ right, added in the dtype of `out`."""
    mixed = () if left.dtype == out.dtype else (out.dtype,)
    if add:
        torch.addmm(out, left, right, *mixed, out=out)
    else:
        torch.mm(left, right, *mixed, out=out)


class Head:
    """logits = hidden @ weight.T + bias, a chunk of rows at a time, and the gradients of that projection.

    Chunks share one buffer.  Gradients are accumulated in the accumulator dtype; one that is not needed has size 0.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None, by_column: bool = False
    ) -> None:
        """by_column: the logits [n, V] of a chunk are the columns of a buffer [V, n]."""
        self.dtype = head_dtype(hidden, weight, bias)
        self.hidden = hidden
        self.by_column = by_column
        # one upcast of the weight where products need it: those of rounded logits would leave the error budget
        self.operand_dtype = product_operands(hidden.device, hidden.dtype, weight.dtype)
        self.weight = weight.to(self.operand_dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        if chunk_rows is None:
            chunk_bytes = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
            chunk_rows = max(1, chunk_bytes // (self.dtype.itemsize * weight.shape[0]))
            if by_column:
                chunk_rows = min(max(chunk_rows, MIN_CHUNK_COLUMNS), MAX_CHUNK_COLUMNS)
        self.chunk_rows = chunk_rows
        self.d_hidden = self.d_weight = self.d_bias = hidden.new_empty(0, dtype=self.dtype)
        # d_weight is large: its first share is written, not added to zeros that would be written and read before
        self._has_d_weight = False

    def allocate_gradients(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        """Room for the gradients that are needed; separate tensors of size 0 for the others."""
        hidden, dtype = self.hidden, self.dtype
        self.d_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
        self.d_weight = hidden.new_empty(self.weight.shape if need_weight else (0,), dtype=dtype)
        self.d_bias = hidden.new_zeros(self.weight.shape[:1] if need_bias else (0,), dtype=dtype)

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(Row indices [n], their hidden states [n, D], their logits [n, V]); the logits last until the next chunk."""
        vocab, most = self.weight.shape[0], min(self.chunk_rows, len(rows))
        if self.by_column:
            most = equal_chunks(len(rows), self.chunk_rows)
            columns = self.hidden.new_empty((vocab, padded_columns(most)), dtype=self.dtype)
            # the sweep reads whole vectors; in later chunks the rest of the last one is of the chunk before
            filled = min(most, len(rows))
            columns[:, filled : whole_vectors(filled)].zero_()
            buffer = columns.t()
        else:
            buffer = self.hidden.new_empty((most, vocab), dtype=self.dtype)
        for chunk in rows.split(most) if len(rows) else ():
            hidden = self.hidden[chunk].to(self.operand_dtype)
            logits = buffer[: len(chunk)]
            if self.bias is None:
                multiply_(logits, hidden, self.weight.t())
            else:
                multiply_(logits.copy_(self.bias), hidden, self.weight.t(), add=True)
            yield chunk, hidden, logits

    def accumulate(self, chunk: Tensor, hidden: Tensor, d_logits: Tensor, columns: Sequence[slice] = EVERY) -> None:
        """Add a chunk's share to the gradients that were allocated.

        columns: the runs of the vocabulary that take part in the two products, d_logits elsewhere counting as 0.
        """
        if self.d_bias.numel():
            self.d_bias.add_(d_logits.sum(dim=0))
        d_logits = d_logits.to(self.operand_dtype)
        if self.d_hidden.numel():
            d_hidden = self.d_hidden.new_zeros((len(chunk), self.d_hidden.shape[1]))
            for i, run in enumerate(columns):
                multiply_(d_hidden, d_logits[:, run], self.weight[run], add=i > 0)
            self.d_hidden[chunk] = d_hidden
        if self.d_weight.numel():
            if columns is not EVERY:
                self._zero_missing_d_weight()
            for run in columns:
                multiply_(self.d_weight[run], d_logits[:, run].t(), hidden, add=self._has_d_weight)
            self._has_d_weight = True

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d_hidden [N, D], d_weight [V, D], d_bias [V]), once all chunks are in; [0] where not needed."""
        self._zero_missing_d_weight()
        return self.d_hidden, self.d_weight, self.d_bias

    def _zero_missing_d_weight(self) -> None:
        if not self._has_d_weight:
            self.d_weight.zero_()
            self._has_d_weight = True


def row_sweeps(targets: Tensor, temperature: float, row_temperature: Tensor | None, softcap: float) -> RowSweeps:
    """The sweeps of this backend."""
    targets = targets.long()
    scale = LogitScale(temperature, row_temperature, softcap)

    def write_statistics(logits: Tensor, chunk: Tensor, statistics: RowStatistics, keep_logits: bool) -> None:
        for block in row_blocks(logits):
            rows = chunk[block]
            x = logits[block].clone() if keep_logits else logits[block]
            scale.apply_(x, rows)
            store_statistics(statistics, rows, row_softmax_(x, targets[rows]))

    def gradient_(
        logits: Tensor, chunk: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, statistics: RowStatistics
    ) -> None:
        for block in row_blocks(logits):
            rows = chunk[block]
            turn_into_d_logits_(logits[block], rows, targets[rows], scale, grad_logprobs, grad_entropy, statistics)

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


def chunked_statistics(head: Head, sweeps: RowSweeps) -> RowStatistics:
    """The per-token forward of any backend: statistics of every row, a chunk of logits at a time."""
    statistics = empty_statistics(head.hidden, head.dtype)
    for rows, _, logits in head.chunks(torch.arange(len(head.hidden), device=head.hidden.device)):
        sweeps.statistics(logits, rows, statistics, False)
    return statistics


def chunked_gradients(
    head: Head,
    needs: tuple[bool, bool, bool],
    sweeps: RowSweeps,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The per-token backward of any backend, over the rows that something flows back to."""
    head.allocate_gradients(*needs)
    # Not the statistics of the forward pass: other rows stood in its products, so its logits differ by rounding, which
    # exp(logit - row_max - log_sum) shows in full where logits are large.
    statistics = empty_statistics(head.hidden, head.dtype)
    for chunk, hidden, logits in head.chunks(rows_with_gradient(grad_logprobs, grad_entropy)):
        if sweeps.reads_statistics:
            sweeps.statistics(logits, chunk, statistics, True)
        sweeps.gradient_(logits, chunk, grad_logprobs, grad_entropy, statistics)
        head.accumulate(chunk, hidden, logits)
    return head.gradients()
