"""Which dtype a result, a sum and a gradient have, and where they are rounded: once, at the end."""

import warnings

import pytest
import torch

from gtpo_kernels import (
    LossRule,
    clipped_loss,
    gtpo_loss,
    linear_gtpo_loss,
    linear_token_logprobs,
    rollout_weights,
    token_logprobs,
)
from gtpo_kernels.testing import assert_matches_reference, assert_within_budget
from gtpo_kernels.token_logprobs import kernel_torch
from tests.kernels.conftest import (
    HEAD,
    Case,
    assert_equal,
    backends,
    fit,
    head_case,
    logits_case,
    logits_loss_case,
    loss_case,
)

FAMILY = "gtpo_loss"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# hidden states, weight, bias
MIXES = [(BF16, FP32, FP32), (FP16, FP32, None), (FP32, BF16, BF16), (BF16, BF16, FP32), (FP32, FP64, FP32)]
mixes = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(dtype)[6:] for dtype in mix))


def mixed(case: Case, mix: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> Case:
    """The head in these dtypes; no bias for None."""
    return {**case, **{name: dtype and case[name].to(dtype) for name, dtype in zip(HEAD, mix, strict=True)}}


@mixes
def test_hidden_states_and_head_of_different_dtypes(mix: tuple[torch.dtype, ...], kernel: str) -> None:
    leaves = [name for name, dtype in zip(HEAD, mix, strict=True) if dtype]
    shape = fit(kernel, 61, 293, 19)
    cases = [mixed(loss_case(*shape, seed=seed), mix) for seed in range(3)]
    if FP64 not in mix:
        assert_matches_reference(linear_gtpo_loss, cases, leaves, backend=kernel)
        tokens = [mixed(head_case(*shape, seed=1), mix)]
        assert_matches_reference(linear_token_logprobs, tokens, leaves, backend=kernel)
    for name in leaves:
        leaf = cases[0][name].clone().requires_grad_()
        loss = linear_gtpo_loss(**{**cases[0], name: leaf}, backend=kernel).loss
        assert loss.dtype == (FP64 if FP64 in mix else FP32)
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = loss_of_reference(cases[0], name)
        torch.testing.assert_close(gradient, expected)


def loss_of_reference(case: Case, name: str) -> torch.Tensor:
    leaf = case[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_gtpo_loss(**{**case, name: leaf}, backend="reference").loss, leaf)
    return gradient


# rows that are projected again, in other company, differ by rounding, which large logits show in full
@pytest.mark.parametrize("rows_with_gradient", [[3], [0, 17, 31, 64, 128]])
def test_a_gradient_into_few_rows_of_large_logits(rows_with_gradient: list[int], kernel: str) -> None:
    case = head_case(*fit(kernel, 129, 507, 123), seed=2)
    case["weight"] = case["weight"] * 300
    rows = torch.tensor([row for row in rows_with_gradient if row < len(case["targets"])])
    upstream = torch.zeros(len(case["targets"])).index_fill_(0, rows, 1.0)

    def gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = {name: case[name].to(dtype).requires_grad_() for name in HEAD}
        token = linear_token_logprobs(**leaves, targets=case["targets"], backend=backend)
        return list(
            torch.autograd.grad([token.logprobs, token.entropy], list(leaves.values()), [upstream.to(dtype)] * 2)
        )

    exact, plain = gradients("reference", FP64), gradients("reference", FP32)
    for ours, usual, right in zip(gradients(kernel, FP32), plain, exact, strict=True):
        error, usual_error = ((x.double() - right).norm() / right.norm() for x in (ours, usual))
        assert error <= 4 * usual_error + 1e-6


@pytest.mark.parametrize("rule", [LossRule(), LossRule("cispo", entropy_coef=0.01)], ids=["clipped", "ruled"])
def test_float16_gradients_under_a_loss_scale(rule: LossRule, kernel: str) -> None:
    num_rows, vocab = fit(kernel, 8, 4001)
    scale = 2.0**16
    case = logits_loss_case(num_rows, vocab, seed=3, dtype=FP16)
    options: Case = {"rule": rule, "num_loss_tokens": 4096}

    def gradient(backend: str, dtype: torch.dtype) -> torch.Tensor:
        leaf = case["logits"].to(dtype).requires_grad_()
        loss = gtpo_loss(**{**case, "logits": leaf}, **options, backend=backend).loss
        (found,) = torch.autograd.grad(loss, leaf, torch.tensor(scale, dtype=loss.dtype))
        assert found.dtype == dtype
        return found

    ours, usual, exact = gradient(kernel, FP16), gradient("reference", FP16), gradient("reference", FP64)
    assert_within_budget(ours, usual, exact)
    assert (ours == 0).sum() == (usual == 0).sum()
    assert_equal(
        [loss_bits(gtpo_loss(**case, **options, backend=kernel))],
        [
            loss_bits(
                gtpo_loss(**{**case, "logits": case["logits"].clone().requires_grad_()}, **options, backend=kernel)
            )
        ],
    )


def loss_bits(result: object) -> torch.Tensor:
    return result.loss.detach()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_of_16_bits_are_multiplied_in_float32(dtype: torch.dtype, backend: str) -> None:
    case = logits_loss_case(*fit(backend, 9, 41), seed=5)
    advantages, weights = case["advantages"].to(dtype), torch.linspace(1e-3, 1.7, len(case["advantages"])).to(dtype)
    given = {**case, "advantages": advantages, "token_weights": weights}
    multiplied = {**case, "advantages": advantages.float() * weights.float()}
    one, other = (gtpo_loss(**values, backend=backend) for values in (given, multiplied))
    assert_equal([one.loss, *one.metrics], [other.loss, *other.metrics])
    # and what is below the range of float16 is no 0, which would leave the token out
    tiny = {**case, "advantages": torch.full_like(advantages, 1e-4), "token_weights": torch.full_like(weights, 1e-4)}
    assert gtpo_loss(**tiny, backend=backend).metrics.dropped_tokens == 0


@pytest.mark.parametrize("dtypes", [(FP16, FP32), (BF16, FP32), (FP32, FP16), (FP16, FP64), (FP32, FP64)])
def test_an_entropy_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for name in backends("clipped_loss", with_reference=True):
        logprobs = torch.linspace(-3, -1, 7).to(dtypes[0]).requires_grad_()
        entropy = torch.linspace(0.1, 2, 7).to(dtypes[1]).requires_grad_()
        loss = clipped_loss(
            logprobs, torch.ones(7), entropy=entropy, rule=LossRule(entropy_coef=0.3), num_loss_tokens=1e5, backend=name
        ).loss
        of_logprobs, of_entropy = torch.autograd.grad(loss, [logprobs, entropy])
        assert (of_logprobs.dtype, of_entropy.dtype) == dtypes
        torch.testing.assert_close(of_entropy, torch.full((7,), -0.3 / 1e5, dtype=dtypes[1]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_a_temperature_a_row_changes_no_dtype_and_gets_no_gradient(dtype: torch.dtype, backend: str) -> None:
    case, rows = logits_case(5, 23), logits_loss_case(5, 23)
    temperature = torch.linspace(0.5, 2, 5).to(dtype).requires_grad_()
    token = token_logprobs(case["logits"].requires_grad_(), case["targets"], temperature=temperature, backend=backend)
    assert {value.dtype for value in token} == {FP32}
    result = gtpo_loss(**{**rows, "logits": rows["logits"].requires_grad_()}, temperature=temperature, backend=backend)
    assert result.loss.dtype == FP32
    for value in (token.logprobs.sum(), result.loss):
        value.backward()
    assert temperature.grad is None


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("num_tokens", [1_000, 10_000])
def test_shared_rollout_weights_are_summed_in_float32(dtype: torch.dtype, num_tokens: int) -> None:
    old = torch.full((num_tokens,), -0.7, dtype=dtype)
    rollout = torch.full((num_tokens,), -1.0, dtype=dtype)
    ids, mask = torch.zeros(num_tokens, dtype=torch.int64), torch.ones(num_tokens, dtype=torch.bool)
    weights = rollout_weights(old, rollout, mask, correction="truncated", ratio_ids=ids)
    assert weights.dtype == dtype
    assert weights.unique().tolist() == [(old[0].double() - rollout[0].double()).exp().to(dtype).item()]
    # a difference of float64 log-probabilities is one of float64
    fine = rollout_weights(old.double() + 1e-12, old.double(), mask, correction="truncated")
    torch.testing.assert_close(fine, torch.full_like(fine, 1e-12).exp(), rtol=0, atol=1e-15)


def test_rollout_weights_stay_within_their_dtype() -> None:
    old, rollout = torch.tensor([-1.0, -1.0], dtype=FP16), torch.tensor([-13.0, -1.5], dtype=FP16)
    mask = torch.ones(2, dtype=torch.bool)
    for correction in ("truncated", "masked"):
        weights = rollout_weights(old, rollout, mask, correction=correction, high=1e6)  # type: ignore[arg-type]
        assert weights.tolist() == [65504.0, pytest.approx(0.5 + 1.1487, abs=1e-3)]


def test_a_slow_product_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    kernel_torch.say_that_products_are_slow.cache_clear()
    for version, fast in [("2.11.0", True), ("2.11.0a0+git1", True), ("2.13.0+cu130", True), ("2.9.1", False)]:
        monkeypatch.setattr(torch, "__version__", version)
        if fast:
            assert kernel_torch.product_operands(device, BF16, BF16) == BF16
        else:
            with pytest.warns(UserWarning, match="torch 2.9.1 lacks out_dtype of mm and addmm, 2.11 has it"):
                assert kernel_torch.product_operands(device, BF16, BF16) == FP32
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert kernel_torch.product_operands(device, BF16, BF16) == FP32
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm7")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(UserWarning, match="ROCm: the head's products are in float32, about 12 times as slow"):
        assert kernel_torch.product_operands(device, BF16, BF16) == FP32
    with pytest.warns(UserWarning, match="below the range of float16, use bfloat16"):
        assert kernel_torch.product_operands(device, FP16, FP16) == FP32
    kernel_torch.say_that_products_are_slow.cache_clear()
    with warnings.catch_warnings():
        # a head of float32 is asked for, and a CPU has no faster way
        warnings.simplefilter("error")
        assert kernel_torch.product_operands(device, BF16, FP32) == FP32
        assert kernel_torch.product_operands(torch.device("cpu"), FP16, FP16) == FP32
        assert kernel_torch.product_operands(device, FP64, FP64) == FP64
