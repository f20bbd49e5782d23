"""Faults that other libraries' kernels had or have, each as a test that every backend here passes.

The name of a test says what must hold; the comment, whose fault it was, with its public thread where there is one.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_kernels import (
    TurnCredit,
    gtpo_loss,
    linear_gtpo_loss,
    linear_token_logprobs,
    token_logprobs,
    turn_advantages,
    turn_returns,
)
from tests.kernels.conftest import (
    HEAD,
    INF,
    NAN,
    assert_close,
    assert_equal,
    backends,
    emulated,
    fit,
    head_case,
    interpreted,
    logits_case,
    logits_loss_case,
    loss_and_gradients,
    loss_case,
)

FAMILY = "gtpo_loss"
CREDIT = pytest.mark.parametrize("credit_backend", backends("turn_advantages", with_reference=True))


def lone_logit(vocab: int, index: int) -> tuple[Tensor, Tensor]:
    """A row in which only the target is possible."""
    logits = torch.full((1, vocab), -INF)
    logits[0, index] = 1.5
    return logits.requires_grad_(), torch.tensor([index])


# flash-attention #1930 (NaN at 30,000 of 40,000), Liger cross entropy (69,000 of 70,000), Liger selective_log_softmax
# and TRL 1.16 logprob_entropy (3,000 of 5,000): a block of nothing but -inf before the first finite logit
@pytest.mark.parametrize(("vocab", "index"), [(5_000, 3_000), (40_000, 30_000), (70_000, 69_000)])
def test_blocks_of_minus_infinity_come_before_the_only_finite_logit(vocab: int, index: int, backend: str) -> None:
    logits, targets = lone_logit(vocab, index)
    token = token_logprobs(logits, targets, backend=backend)
    assert (token.logprobs.item(), token.entropy.item(), token.lse.item()) == (0.0, 0.0, 1.5)
    (token.logprobs + token.entropy).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    logits, targets = lone_logit(vocab, index)
    loss, metrics = gtpo_loss(logits, targets, torch.tensor([2.0]), backend=backend)
    loss.backward()
    assert (loss.item(), metrics.logprob_mean.item(), metrics.entropy.item()) == (-2.0, 0.0, 0.0)
    assert logits.grad is not None
    assert not logits.grad.any()


# cut-cross-entropy (a tile of -inf), prime-rl (a first chunk of -inf): the same from hidden states
def test_a_padded_vocabulary_has_no_mass(backend: str) -> None:
    case = head_case(3, 601, 4)
    bias = torch.full((601,), -INF)
    bias[400:402] = 0.0
    case = {**case, "bias": bias.requires_grad_(), "targets": torch.tensor([400, 401, 400])}
    token = linear_token_logprobs(**case, backend=backend)
    two = (case["hidden"] @ case["weight"][400:402].T).log_softmax(dim=1)
    torch.testing.assert_close(token.logprobs, two.gather(1, (case["targets"] - 400)[:, None]).squeeze(1))
    torch.testing.assert_close(token.entropy, -(two.exp() * two).sum(dim=1))
    (token.logprobs.sum() + token.entropy.sum()).backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
    assert bias.grad.nonzero().squeeze(1).tolist() == [400, 401]


# verl: the maximum over blocks starts at 0, so logits that are all very negative underflow: logprob +inf, entropy NaN
@pytest.mark.parametrize("level", [-200.0, -1e4])
def test_logits_that_are_all_very_negative(level: float, backend: str) -> None:
    # verl #2899: with a vocabulary that no block size divides, lanes beyond its end took part in the sum
    for vocab in (257, 1_001):
        token = token_logprobs(torch.full((2, vocab), level), torch.tensor([0, vocab - 1]), backend=backend)
        assert token.logprobs.tolist() == pytest.approx([-math.log(vocab)] * 2, rel=1e-6)
        assert token.entropy.tolist() == pytest.approx([math.log(vocab)] * 2, rel=1e-6)
        hidden, weight = torch.ones(2, 3), torch.full((vocab, 3), level / 3)
        token = linear_token_logprobs(hidden, weight, torch.tensor([0, vocab - 1]), backend=backend)
        assert token.logprobs.tolist() == pytest.approx([-math.log(vocab)] * 2, rel=1e-6)


# verl #2656: log-probabilities of up to +123
def test_no_logprob_is_positive(backend: str) -> None:
    for scale in (1.0, 30.0, 1e3):
        case = logits_case(13, 131, seed=2)
        logits = scale * case["logits"]
        for targets in (case["targets"], logits.argmax(dim=1)):
            assert (token_logprobs(logits, targets, backend=backend).logprobs <= 0).all()


# torch #195829: a wrong loss where all logits share a large offset
def test_a_large_common_offset_changes_no_bit(backend: str) -> None:
    case = logits_case(7, 131)
    logits = (case["logits"] * 8).round() / 8
    moved = token_logprobs(logits + 8192.0, case["targets"], backend=backend)
    assert_equal(moved[:2], token_logprobs(logits, case["targets"], backend=backend)[:2])


# TRL #7221, #7252, #7263: the entropy is NaN where a probability is 0, and its gradient where the value was mended
def test_entropy_and_its_gradient_where_probabilities_are_zero(backend: str) -> None:
    case = logits_case(4, 31)
    logits = case["logits"]
    logits[:, ::3] = -INF
    logits[1] = -INF
    logits[2] *= 1e3
    logits.requires_grad_()
    entropy = token_logprobs(logits, case["targets"], backend=backend).entropy
    entropy.sum().backward()
    assert entropy.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# unsloth #10616: a cap applied after the padding makes -softcap of -inf, a finite logit with mass
def test_a_softcap_does_not_bring_masked_logits_back(backend: str) -> None:
    case = logits_case(5, 40)
    padded = torch.cat([case["logits"], torch.full((5, 17), -INF)], dim=1).requires_grad_()
    plain = token_logprobs(**case, softcap=3.0, backend=backend)
    token = token_logprobs(padded, case["targets"], softcap=3.0, backend=backend)
    assert_close(token, plain)
    token.logprobs.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[:, 40:].any()
    assert padded.grad[:, :40].all()


# Liger fused linear GRPO: advantages of [B, T] give 0.150, 0.246, 0.527 with chunk_size 1, 2, 4 (0.150 is right);
# fla, torchtune and RL-Kernel read one advantage a sequence
def test_an_advantage_a_token_in_chunks_of_any_size(backend: str) -> None:
    case = loss_case(12, 29, 6, dtype=torch.float64)
    logprobs = linear_token_logprobs(**{name: case[name] for name in (*HEAD, "targets")}, backend="reference").logprobs
    ratio = (logprobs - case["old_logprobs"]).exp()
    surrogate = torch.minimum(ratio * case["advantages"], ratio.clamp(0.8, 1.28) * case["advantages"])
    expected = -surrogate[case["loss_mask"]].mean()
    assert len(case["advantages"].unique()) > 6
    gradients = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend="reference")[1:]
    for chunk_rows in (1, 2, 4, 12, None):
        results = loss_and_gradients(linear_gtpo_loss, case, HEAD, chunk_rows=chunk_rows, backend=backend)
        assert_close(results, [expected, *gradients])


# F.linear_cross_entropy (torch 2.13): per-token losses in the dtype of the inputs, off by 0.03 to 0.046 in bfloat16,
# and a policy gradient built on them 7 % wrong (all others: 0.24 to 0.4 %)
def test_the_gradient_from_bfloat16_inputs(backend: str) -> None:
    case = loss_case(*fit(backend, 120, 507, 123), dtype=torch.bfloat16)
    exact = {name: value.double() if name in HEAD else value for name, value in case.items()}
    case["old_logprobs"] = exact["old_logprobs"] = linear_token_logprobs(
        **{name: exact[name] for name in (*HEAD, "targets")}, backend="reference"
    ).logprobs
    loss, *gradients = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=backend)
    expected, *expected_gradients = loss_and_gradients(linear_gtpo_loss, exact, HEAD, backend="reference")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        assert (gradient.double() - right).norm() <= 2.5e-3 * right.norm()


# prime-rl, verl, Liger, cut-cross-entropy #14: gradients summed over chunks or tiles in bfloat16
def test_many_chunks_lose_nothing_in_bfloat16(backend: str) -> None:
    case = loss_case(*fit(backend, 252, 64, 16), dtype=torch.bfloat16)
    one, many = (
        loss_and_gradients(linear_gtpo_loss, case, HEAD, chunk_rows=chunk_rows, backend=backend)
        for chunk_rows in (1000, 1)
    )
    for gradient, other in zip(one[1:], many[1:], strict=True):
        # one rounding of a float32 sum: the neighbouring bfloat16 at most
        assert (gradient.double() - other.double()).norm() <= 1e-3 * gradient.double().norm()


# Liger: a masked token with a stale old log-probability has a ratio of infinity, and inf * 0 is NaN
@pytest.mark.parametrize("stale", [-200.0, 200.0, -INF, NAN])
def test_stale_old_logprobs_under_the_mask(stale: float, backend: str) -> None:
    case = logits_loss_case(8, 11, seed=1)
    case["loss_mask"][2:4] = False
    case["advantages"] += 3.0
    clean = loss_and_gradients(gtpo_loss, case, ["logits"], backend=backend)
    case["old_logprobs"][2:4] = stale
    assert_equal(loss_and_gradients(gtpo_loss, case, ["logits"], backend=backend), clean)


# the same inside the mask: the log ratio is clamped, as verl does, and no gradient flows beyond the clamp
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_ratio_of_200_stays_finite(advantage: float, backend: str) -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    options = {"old_logprobs": torch.tensor([-200.0, 200.0]), "backend": backend}
    loss = gtpo_loss(logits, torch.tensor([0, 1]), torch.full((2,), advantage), **options).loss
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert not logits.grad.any()


# Automodel #3796, torchtune #2341: NaN from a batch that is masked throughout
def test_a_batch_without_loss_tokens(backend: str) -> None:
    case = logits_loss_case(5, 7)
    case["loss_mask"][:] = False
    loss, d_logits = loss_and_gradients(gtpo_loss, case, ["logits"], backend=backend)
    assert loss == 0
    assert not d_logits.any()


# TRL #4975: the tool mask is dropped on the fused path, so tokens that a tool wrote are trained on
def test_tool_tokens_are_not_trained_on(backend: str) -> None:
    turn_ids = torch.tensor([-1, 0, -1, -1, 1, 1])
    credit = TurnCredit(torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), torch.tensor([0]), turn_ids, scope="none")
    case = {**logits_case(6, 9), "advantages": credit}
    (_, d_logits) = loss_and_gradients(gtpo_loss, case, ["logits"], backend=backend)
    assert d_logits.any(dim=1).tolist() == (turn_ids >= 0).tolist()


# Liger #1294: rows on the second axis of a CUDA grid, which ends at 65,535
def test_more_rows_than_a_grid_axis_has(backend: str) -> None:
    if interpreted(backend) or emulated(backend):
        pytest.skip("needs a GPU: 65,600 interpreted programs take minutes")
    num_rows = 65_600
    targets = torch.arange(num_rows) % 3
    logits = torch.zeros(num_rows, 3, requires_grad=True)
    loss = gtpo_loss(logits, targets, torch.ones(num_rows), num_loss_tokens=1, backend=backend).loss
    loss.backward()
    assert loss.item() == -num_rows
    expected = 1 / 3 - torch.nn.functional.one_hot(targets, 3).float()
    torch.testing.assert_close(logits.grad, expected)
    token = token_logprobs(logits, targets, backend=backend)
    torch.testing.assert_close(token.logprobs, torch.full((num_rows,), -math.log(3.0)))


# cut-cross-entropy #37, fla #1080: offsets in 32 bits, and an illegal memory access beyond 2**31 elements
def test_offsets_beyond_32_bits(backend: str) -> None:
    case = logits_loss_case(2, 9, dtype=torch.bfloat16)
    case["loss_mask"][:], case["advantages"] = True, torch.tensor([1.0, -1.0])
    # 4 GiB of addresses, of which two pages are ever touched
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 9), (2**31 + 32, 1))
    far.copy_(case["logits"])
    # as far apart in the same pattern, or sums would be taken in another order
    case["logits"] = torch.empty(64, dtype=torch.bfloat16).as_strided((2, 9), (32, 1)).copy_(case["logits"])
    assert_equal(
        token_logprobs(far, case["targets"], backend=backend),
        token_logprobs(case["logits"], case["targets"], backend=backend),
    )
    (loss, metrics), (near_loss, near_metrics) = (
        gtpo_loss(**{**case, "logits": logits}, backend=backend) for logits in (far, case["logits"])
    )
    assert_equal([loss, *metrics], [near_loss, *near_metrics])


# flash-attention and cut-cross-entropy work around it: int64 targets that are not aligned to 16 bytes
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_at_any_alignment(dtype: torch.dtype, backend: str) -> None:
    case = logits_case(5, 23)
    shifted = torch.cat([torch.zeros(1, dtype=dtype), case["targets"].to(dtype)])[1:]
    assert shifted.storage_offset() == 1
    assert_equal(token_logprobs(case["logits"], shifted, backend=backend), token_logprobs(**case, backend=backend))


# cut-cross-entropy #31: a sharded weight; a row of the softmax needs all of the vocabulary, and full_tensor() without
# placements takes the gradient for the same on all ranks
def test_a_sharded_weight_is_refused_with_a_hint(backend: str) -> None:
    class DTensor(Tensor):
        pass

    case = head_case(3, 5, 2)
    weight: Any = case["weight"].as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"got a DTensor: pass weight.full_tensor\(grad_placements=\[Partial\(\)\]"):
        linear_token_logprobs(case["hidden"], weight, case["targets"], backend=backend)
    hidden: Any = case["hidden"].as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"got a DTensor: pass hidden.to_local\(\), the rows of this rank"):
        linear_token_logprobs(hidden, case["weight"], case["targets"], backend=backend)


# RL-Kernel: group variance as E[x^2] - E[x]^2 in float32, which cancels to nothing for rewards of 1e4
@CREDIT
def test_group_statistics_do_not_cancel(credit_backend: str) -> None:
    rewards = torch.tensor([10_000.0, 10_001.0, 10_000.0, 10_003.0])
    small = rewards.double() - 10_000.0
    expected = (small - small.mean()) / (small.std() + 1e-6)
    turns = torch.arange(4)
    credit = turn_advantages(rewards, torch.arange(5), torch.zeros(4).long(), turns, backend=credit_backend)
    torch.testing.assert_close(credit.advantages, expected.float())


# PufferLib reads one element beyond the row; loops of verl and ROLL discount per token
@CREDIT
def test_returns_stop_at_the_end_of_a_trajectory(credit_backend: str) -> None:
    rewards = torch.tensor([0.0, 1.0, 1e6, 0.0, 2.0])
    returns = turn_returns(rewards, torch.tensor([0, 2, 3, 5]), gamma=0.5, backend=credit_backend)
    assert returns.tolist() == [0.5, 1.0, 1e6, 1.0, 2.0]


# rl-triton met it in a baseline: discounts as a difference of cumulative logarithms underflow on long rows
@CREDIT
def test_long_trajectories_do_not_underflow(credit_backend: str) -> None:
    num_turns = 3_000
    returns = turn_returns(torch.ones(num_turns), torch.tensor([0, num_turns]), gamma=0.5, backend=credit_backend)
    expected = 2.0 - 0.5 ** torch.arange(num_turns - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(returns, expected.float())
    assert_equal(
        [turn_returns(torch.ones(9), torch.tensor([0, 9]), gamma=0.0, backend=credit_backend)], [torch.ones(9)]
    )
