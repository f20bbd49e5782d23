"""What the Triton kernels share: how they are launched, and device functions of a row, its softmax, the loss's slope.

A row is held as y with x = scale * y, where x is what the softmax sees: y = logits, scale = 1 / temperature, or with a
softcap y = tanh(logits / softcap), scale = softcap / temperature.  So x - x_max = scale * (y - y_max) has no rounding
of x in it.  ACC is the accumulator dtype.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# A fused multiply-add would leave an unrounded product in one place and a rounded one in another.
LAUNCH = {"enable_fp_fusion": False}
INF = tl.constexpr(float("inf"))
# exp() gives 0 as it does for -inf, but 0 * LOG_ZERO is 0, not NaN.
LOG_ZERO = tl.constexpr(-1e5)
MAX_LOG_RATIO = tl.constexpr(20.0)


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device.  Infinities are part of the arithmetic: the interpreter does not warn of them."""
    with torch.cuda.device_of(tensor), np.errstate(all="ignore"):
        yield


class RowScale(NamedTuple):
    """How kernels are told to scale logits: by products alone, as a division in float64 is a call.

    row_inverse: [N] float64, 1 / temperature of every row, or None for one of all rows.
    """

    inverse_temperature: float
    row_inverse: Tensor | None
    softcap: float
    inverse_softcap: float


def row_scaling(temperature: float, row_temperature: Tensor | None, softcap: float) -> RowScale:
    """The scale of ops that take temperature, row_temperature and softcap (0.0 for none)."""
    row_inverse = None if row_temperature is None else 1.0 / row_temperature.double()
    return RowScale(1.0 / temperature, contiguous(row_inverse), softcap, 1.0 / softcap if softcap else 0.0)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A vector as kernels index it, by row alone."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A runtime argument as a scalar of DTYPE: a number when interpreted, a float64 when compiled."""
    return tl.full((), value, tl.float64).to(DTYPE)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in `dtype`, to nearest even.  The interpreter would cut a float32 off where bfloat16 ends."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(u):
    """A quotient of polynomials near 0, where the exponential form cancels.  The interpreter has no libdevice."""
    u2 = u * u
    near = u * (135135.0 + u2 * (17325.0 + u2 * (378.0 + u2)))
    near = near / (135135.0 + u2 * (62370.0 + u2 * (3150.0 + u2 * 28.0)))
    decay = tl.exp(-2.0 * tl.abs(u))
    far = 1.0 - 2.0 * decay / (1.0 + decay)
    # the quotient is good to 2e-15 up to 0.4, and to 5e-11 up to 1
    EDGE: tl.constexpr = 1.0 if u.dtype == tl.float32 else 0.4
    return tl.where(tl.abs(u) < EDGE, near, tl.where(u < 0.0, -far, far))


@triton.jit
def squash(logits, inverse_softcap, HAS_SOFTCAP: tl.constexpr):
    """y of logits.  An infinite logit is a mask, put on after the cap: it stays what it is."""
    if HAS_SOFTCAP:
        capped = tanh(logits * scalar(inverse_softcap, logits.dtype))
        return tl.where(tl.abs(logits) == INF, logits, capped)
    else:
        return logits


@triton.jit
def load_row_block(row_ptr, columns, vocab, inverse_softcap, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """y of some columns of a row, -inf beyond its end."""
    logits = tl.load(row_ptr + columns, mask=columns < vocab, other=-float("inf")).to(ACC)
    return squash(logits, inverse_softcap, HAS_SOFTCAP)


@triton.jit
def row_scale(inverse_temperature, row_inverse_ptr, row, softcap, HAS_SOFTCAP: tl.constexpr):
    """(1 / temperature, scale) of a row, or of a block of rows, in float64."""
    if row_inverse_ptr is None:  # noqa: SIM108 - a pointer that is None cannot stand in an expression
        inverse = scalar(inverse_temperature, tl.float64)
    else:
        inverse = tl.load(row_inverse_ptr + row)
    scale = inverse * scalar(softcap, tl.float64) if HAS_SOFTCAP else inverse
    return inverse, scale


@triton.jit
def below_max(y, y_max, scale):
    """x - x_max.  A row of all -inf must give -inf, not NaN, so the shift is 0 there."""
    return (y - tl.where(y_max == -INF, 0.0, y_max)) * scale


@triton.jit
def target_logprob(y_target, y_max, scale, log_sum):
    """log p of the target.  scale: in float64, as its rounding would count for a target far below the maximum."""
    below = below_max(y_target.to(tl.float64), y_max.to(tl.float64), scale)
    return (below - log_sum).to(log_sum.dtype)


@triton.jit
def row_statistics(y, scale):
    """(y_max, sum w, sum w log w, w) of a block of one row, with w = exp(x - x_max)."""
    y_max = tl.max(y, 0)
    below = below_max(y, y_max, scale)
    weights = tl.exp(below)
    return y_max, tl.sum(weights, 0), tl.sum(weights * tl.maximum(below, LOG_ZERO), 0), weights


@triton.jit
def shift_statistics(total, moment, y_max, new_max, scale):
    """(sum w, sum w log w) held against another maximum."""
    drop = tl.maximum(below_max(y_max, new_max, scale), LOG_ZERO)
    kept = tl.exp(drop)
    return kept * total, kept * (moment + total * drop)


@triton.jit
def streamed_statistics(
    row_ptr, first, end, inverse_softcap, scale, HAS_SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr
):
    """`row_statistics` of the columns first .. end of a row, a block at a time.  first: a multiple of BLOCK_V."""
    lanes = tl.arange(0, BLOCK_V)
    y_max = tl.full((), -INF, ACC)
    total = tl.zeros((BLOCK_V,), ACC)
    moment = tl.zeros((BLOCK_V,), ACC)
    for start in range(first, end, BLOCK_V):
        y = load_row_block(row_ptr, start + lanes, end, inverse_softcap, HAS_SOFTCAP, ACC)
        new_max = tl.maximum(y_max, tl.max(y, 0))
        total, moment = shift_statistics(total, moment, y_max, new_max, scale)
        below = below_max(y, new_max, scale)
        weights = tl.exp(below)
        total += weights
        moment += weights * tl.maximum(below, LOG_ZERO)
        y_max = new_max
    return y_max, tl.sum(total, 0), tl.sum(moment, 0)


@triton.jit
def log_sum_and_entropy(total, moment):
    """(log sum w, entropy) from sum w and sum w log w; 0 and 0 for a row of all -inf."""
    total = tl.where(total == 0.0, 1.0, total)
    log_sum = tl.log(total)
    if total.dtype == tl.float32:
        # near 1 the device's fast logarithm has an absolute error, which a certain token would show
        z = (total - 1.0) / (total + 1.0)
        z2 = z * z
        series = 2.0 * z * (1.0 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 / 11)))))
        log_sum = tl.where(total < 1.5, series, log_sum)
    return log_sum, log_sum - moment / total


@triton.jit
def d_cap(d_capped, y):
    """Times the slope of the cap.  An infinite y has no probability, and no slope."""
    return tl.where(tl.abs(y) == INF, 0.0, d_capped * (1.0 - y * y))


@triton.jit
def d_logits_block(
    y,
    below,
    log_sum,
    is_target,
    inverse_temperature,
    d_logprob,
    d_entropy,
    entropy,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """(g (1[v = target] - p_v) - h p_v (log p_v + H)) / temperature, times the slope of the cap.  below: x - x_max."""
    p = tl.exp(below) * precise_exp(-log_sum)
    if HAS_ENTROPY:
        d_x = -p * (d_logprob + d_entropy * (tl.maximum(below - log_sum, LOG_ZERO) + entropy))
    else:
        d_x = -p * d_logprob
    d_x = (d_x + tl.where(is_target, d_logprob, 0.0)) * inverse_temperature
    if HAS_SOFTCAP:
        d_x = d_cap(d_x, y)
    return d_x


@triton.jit
def precise_exp(x):
    """exp(x) to a few units in the last place: the device's fast one loses |x| of them."""
    if x.dtype == tl.float32:
        whole = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = (x - whole * 0.693359375) + whole * 2.12194440054690583e-4
        return tl.exp(rest) * tl.exp2(whole)
    else:
        return tl.exp(x)


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x, by its series near 0, where the difference has nothing left."""
    series = 1.0 + x / 17
    for i in tl.static_range(14):
        series = 1.0 + x * series / (16 - i)
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, precise_exp(x) - 1.0 - x)


@triton.jit
def loss_slope(logprob, old_logprob, advantage, denominator, clip_low, clip_high):
    """d loss / d logprob: -ratio * advantage / denominator; 0 if clipped, clamped, infinite."""
    log_ratio = logprob - old_logprob
    ratio = precise_exp(log_ratio)
    # a NaN fails every test and stays to be seen
    infinite = (tl.abs(logprob) == INF) | (tl.abs(old_logprob) == INF)
    clamped = tl.abs(log_ratio) > MAX_LOG_RATIO
    clipped = tl.where(
        advantage > 0.0,
        ratio > scalar(1.0 + clip_high, logprob.dtype),
        ratio < scalar(1.0 - clip_low, logprob.dtype),
    )
    cut = infinite | clamped | (clipped & (advantage == advantage))
    return tl.where(cut, 0.0, -ratio * advantage / denominator)
