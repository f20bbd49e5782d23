"""`token_logprobs` and `linear_token_logprobs`, held against their definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import linear_token_logprobs, token_logprobs
from gtpo_kernels.testing import assert_matches_reference
from tests.kernels.conftest import (
    HEAD,
    INF,
    NAN,
    Case,
    assert_close,
    assert_compiles,
    assert_equal,
    assert_opcheck,
    cpu_only,
    draws,
    edge_logits,
    examples,
    fit,
    head_case,
    interpreted,
    logits_case,
    permutation,
    row_temperature,
    single_rows,
    sizes,
    strided,
)

FAMILY = "token_logprobs"
ops = torch.ops.gtpo_kernels


def every_result(case: Case, **options: object) -> list[Tensor]:
    """logprobs, entropy and lse, and the gradients of the head from the first two."""
    leaves = {name: case[name].clone().requires_grad_() for name in HEAD}
    token = linear_token_logprobs(**{**case, **leaves}, **options)
    total = token.logprobs.sum() + 0.3 * token.entropy.sum()
    return [*(x.detach() for x in token), *torch.autograd.grad(total, list(leaves.values()))]


@sizes
def test_from_logits(shape: tuple[int, int, int], dtype: torch.dtype, kernel: str) -> None:
    cases = draws(kernel, logits_case, *shape[:2], dtype=dtype)
    assert_matches_reference(token_logprobs, cases, ["logits"], backend=kernel, temperature=0.7)
    warmer = [{**case, "temperature": row_temperature(len(case["targets"]))} for case in cases]
    assert_matches_reference(token_logprobs, warmer, ["logits"], backend=kernel, softcap=2.5)


@sizes
def test_from_hidden_states(shape: tuple[int, int, int], dtype: torch.dtype, kernel: str) -> None:
    cases = draws(kernel, head_case, *shape, dtype=dtype)
    warmer = [{**case, "temperature": row_temperature(len(case["targets"]))} for case in cases]
    assert_matches_reference(linear_token_logprobs, warmer, HEAD, backend=kernel, softcap=3.0)
    plain = [{**case, "bias": None} for case in cases]
    assert_matches_reference(linear_token_logprobs, plain, HEAD[:2], backend=kernel, chunk_rows=100)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_edge_rows(softcap: float | None, kernel: str) -> None:
    case = edge_logits()
    for one in (case, *single_rows(case)):
        assert_matches_reference(token_logprobs, [one], ["logits"], backend=kernel, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_infinite_logits_by_the_contract(softcap: float | None, backend: str) -> None:
    case = edge_logits()
    logits = case["logits"].requires_grad_()
    token = token_logprobs(logits, case["targets"], softcap=softcap, backend=backend)
    assert token.logprobs[[1, 2]].tolist() == [-INF, -INF]
    assert token.entropy[2] == 0.0
    assert token.lse[2] == -INF
    # the one possible token is certain: a cap must not bring the others back
    assert token.logprobs[3] == 0.0
    assert token.entropy[3] == 0.0
    assert not any(x.isnan().any() for x in token)
    (d_logits,) = torch.autograd.grad([token.logprobs], [logits], [torch.ones(9)])
    assert d_logits.isfinite().all()
    assert not d_logits[[1, 2]].any()


def test_large_logits_keep_the_small_term(backend: str) -> None:
    # 130 equal logits of 1e4: float32 cannot hold 1e4 + log(130), the pair (row_max, log_sum) can
    token = token_logprobs(torch.full((1, 130), 1e4), torch.tensor([7]), backend=backend)
    assert token.logprobs.item() == pytest.approx(-math.log(130.0), rel=1e-7)
    assert token.entropy.item() == pytest.approx(math.log(130.0), rel=1e-6)


def test_a_softcap_by_hand(backend: str) -> None:
    logits = torch.tensor([[1.0, -2.0, -INF, 50.0]], dtype=torch.float64, requires_grad=True)
    token = token_logprobs(logits, torch.tensor([0]), softcap=2.0, temperature=0.5, backend=backend)
    capped = [2.0 * math.tanh(x / 2.0) / 0.5 for x in (1.0, -2.0, 50.0)]
    weights = [math.exp(x) for x in capped]
    assert token.logprobs.item() == pytest.approx(math.log(weights[0] / sum(weights)), rel=1e-12)
    token.logprobs.sum().backward()
    slopes = [(1.0 - (x / 4.0) ** 2) / 0.5 for x in capped]
    expected = [(float(i == 0) - weights[i] / sum(weights)) * slopes[i] for i in range(3)]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([*expected[:2], 0.0, expected[2]], rel=1e-9, abs=1e-15)


def test_rows_that_nothing_flows_back_to_are_not_read(kernel: str) -> None:
    case = head_case(6, 11, 4)
    case["hidden"][2] = NAN
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    token = linear_token_logprobs(hidden, weight, case["targets"], backend=kernel)
    kept = torch.tensor([0, 1, 3, 4, 5])
    (token.logprobs[kept].sum() + token.entropy[kept].sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert not hidden.grad[2].any()


def test_strided_inputs(kernel: str) -> None:
    case = head_case(13, 29, 6)
    wide = {name: strided(value) for name, value in case.items()}
    assert not wide["hidden"].is_contiguous()
    assert_matches_reference(linear_token_logprobs, [wide], HEAD, backend=kernel)
    for logits in (logits_case(29, 13)["logits"].T, strided(logits_case(13, 29)["logits"])):
        case = {**logits_case(13, 29), "logits": logits}
        assert_matches_reference(token_logprobs, [case], ["logits"], backend=kernel)


def test_int32_targets_are_int64_targets(backend: str) -> None:
    case = logits_case(5, 9)
    narrow = token_logprobs(case["logits"], case["targets"].int(), backend=backend)
    assert_equal(narrow, token_logprobs(**case, backend=backend))


def test_only_what_is_needed_is_computed(kernel: str) -> None:
    case = head_case(4, 9, 3)
    options = (1.0, None, 0.0, None)
    d_hidden, d_weight, d_bias = ops.linear_token_logprobs_backward(
        torch.ones(4), None, *case.values(), *options, True, False, False, kernel
    )
    assert (d_hidden.shape, d_weight.numel(), d_bias.numel()) == ((4, 3), 0, 0)
    hidden = case["hidden"].requires_grad_()
    linear_token_logprobs(hidden, case["weight"], case["targets"], backend=kernel).logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    assert case["weight"].grad is None


def test_laws(kernel: str) -> None:
    @settings(max_examples=examples(kernel, 60))
    @given(
        seed=st.integers(0, 2**31),
        num_rows=st.integers(1, 9),
        vocab=st.integers(1, 40),
        constant=st.floats(-50.0, 50.0),
    )
    def laws(seed: int, num_rows: int, vocab: int, constant: float) -> None:
        case = logits_case(num_rows, vocab, seed=seed, dtype=torch.float64)
        token = token_logprobs(**case, backend=kernel)
        assert (token.logprobs <= 0).all()
        assert (token.entropy > -1e-12).all()
        assert (token.entropy <= math.log(vocab) + 1e-12).all()
        # a constant added to a row's logits moves its lse only
        moved = token_logprobs(case["logits"] + constant, case["targets"], backend=kernel)
        shifts = (0.0, 0.0, constant)
        for one, other, shift in zip(moved, token, shifts, strict=True):
            torch.testing.assert_close(one, other + shift, atol=1e-12, rtol=1e-12)
        # rows know nothing of each other
        order = permutation(num_rows, seed)
        shuffled = token_logprobs(case["logits"][order], case["targets"][order], backend=kernel)
        for one, other in zip(shuffled, token, strict=True):
            torch.testing.assert_close(one, other[order], atol=1e-14, rtol=1e-14)

    laws()


@pytest.mark.parametrize("chunk_rows", [1, 7, 52, 1000])
def test_chunk_size_changes_rounding_only(chunk_rows: int, kernel: str) -> None:
    case = head_case(*fit(kernel, 52, 77, 20))
    assert_matches_reference(linear_token_logprobs, [case], HEAD, backend=kernel, chunk_rows=chunk_rows)


def test_a_repeat_is_bitwise_equal(kernel: str) -> None:
    case = head_case(*fit(kernel, 252, 507, 123))
    assert_equal(*(every_result(case, chunk_rows=64, backend=kernel) for _ in range(2)))


def test_gradcheck(backend: str) -> None:
    case = head_case(4, 6, 3, dtype=torch.float64)
    leaves = [case[name].requires_grad_() for name in HEAD]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"bias": bias, "temperature": row_temperature(4).double(), "softcap": 4.0, "backend": backend}
        return linear_token_logprobs(hidden, weight, case["targets"], **options)[:2]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=interpreted(backend))
    case = logits_case(3, 5, dtype=torch.float64)
    targets, options = case["targets"], {"temperature": 1.3, "backend": backend}
    assert torch.autograd.gradcheck(
        lambda logits: token_logprobs(logits, targets, **options)[:2], (case["logits"].requires_grad_(),)
    )


def test_opcheck(kernel: str) -> None:
    head, rows = head_case(3, 5, 2), logits_case(3, 5)
    options = (1.0, row_temperature(3), 30.0)
    differentiable = [head[name].clone().requires_grad_() for name in HEAD]
    assert_opcheck(ops.token_logprobs, rows["logits"].clone().requires_grad_(), rows["targets"], *options, kernel)
    assert_opcheck(ops.linear_token_logprobs, *differentiable, head["targets"], 0.7, None, 0.0, 2, kernel)
    frozen = (differentiable[0], head["weight"], None, head["targets"])
    assert_opcheck(ops.linear_token_logprobs, *frozen, 0.7, None, 0.0, None, kernel)
    upstream = (torch.linspace(-1, 1, 3), torch.linspace(1, 2, 3))
    statistics = ops.token_logprobs(*rows.values(), *options, kernel)
    assert_opcheck(ops.token_logprobs_backward, *upstream, *rows.values(), *options, *statistics, kernel)
    backward = (*upstream, *head.values(), *options, None, True, False, True, kernel)
    assert_opcheck(ops.linear_token_logprobs_backward, *backward)


def test_compiled_whole(kernel: str) -> None:
    case = head_case(9, 17, 5)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        token = linear_token_logprobs(hidden, weight, case["targets"], temperature=0.8, softcap=9.0, backend=kernel)
        return token.logprobs.sum() - 0.1 * token.entropy.sum()

    assert_compiles(run, case["hidden"], case["weight"])


def test_autocast_does_not_reach_into_the_op(kernel: str) -> None:
    case = head_case(8, 9, 4)
    plain = every_result(case, backend=kernel)
    with torch.autocast(case["hidden"].device.type, dtype=torch.bfloat16):
        assert_close(every_result(case, backend=kernel), plain)


@cpu_only
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\], got shape \(3,\)"),
        ({"hidden": torch.zeros(3, 2).int()}, "hidden must be float32, float64, bfloat16, float16, got int32"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, D\] = \[any, 2\], got shape \(5, 3\)"),
        ({"weight": torch.zeros(5, 2).int()}, "weight must be float32, float64, bfloat16, float16, got int32"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] = \[5\], got shape \(4,\)"),
        ({"targets": torch.zeros(4).long()}, r"targets must be \[N\] = \[3\], got shape \(4,\)"),
        ({"targets": torch.zeros(3)}, "targets must be int32, int64, got float32"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets must lie in \[0, 5\), got values from 0 to 5"),
        ({"targets": torch.zeros(3).long().to("meta")}, "targets must be on cpu, got meta"),
        ({"targets": [0, 1, 2]}, r"targets must be a tensor \[N\], got list"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": torch.ones(2)}, r"temperature must be \[N\] = \[3\], got shape \(2,\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be positive and finite"),
        ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
        ({"softcap": INF}, "softcap must be positive and finite, or None, got inf"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"backend": "tpu"}, "backend must be one of 'reference', 'torch', .*, got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    good = {
        "hidden": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "targets": torch.zeros(3).long(),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**{**good, **bad})


def test_bad_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, V\], got shape \(3,\)"):
        token_logprobs(torch.zeros(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"logits must have a vocabulary of at least 1, got shape \(0, 0\)"):
        token_logprobs(torch.zeros(0, 0), torch.zeros(0).long())
