"""`token_logprobs` and `linear_token_logprobs`, held against their definition."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import BackendUnavailable, linear_token_logprobs, token_logprobs
from gtpo_kernels.testing import assert_matches_reference

INF = float("inf")
Case = dict[str, Any]


def logits_case(
    num_rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, vocab, generator=generator)
    return {"logits": logits.to(dtype), "targets": torch.randint(vocab, (num_rows,), generator=generator)}


def head_case(num_rows: int, vocab: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(num_rows, width, generator=generator).to(dtype),
        "weight": (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=generator).to(dtype),
        "targets": torch.randint(vocab, (num_rows,), generator=generator),
    }


def num_draws(num_rows: int) -> int:
    """Few rows are drawn more often: what float32 errs on one row says little."""
    return 1 if num_rows > 100 else 16


def row_temperature(num_rows: int) -> Tensor:
    return torch.linspace(0.5, 2.0, num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(252, 507), (1, 1), (1, 130), (3, 1), (0, 7)])
def test_from_logits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    draws = [logits_case(*shape, seed=seed, dtype=dtype) for seed in range(num_draws(shape[0]))]
    for temperature in (1.0, 0.7, row_temperature(shape[0])):
        cases = [{**case, "temperature": temperature} for case in draws]
        assert_matches_reference(token_logprobs, cases, ["logits"], backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(252, 507, 123), (1, 130, 5), (5, 1, 3), (0, 7, 4)])
def test_from_hidden_states(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    draws = [head_case(*shape, seed=seed, dtype=dtype) for seed in range(num_draws(shape[0]))]
    differentiable = ["hidden", "weight", "bias"]
    for temperature in (1.0, row_temperature(shape[0])):
        cases = [{**case, "temperature": temperature} for case in draws]
        assert_matches_reference(linear_token_logprobs, cases, differentiable, backend="torch")
    cases = [{**case, "bias": None} for case in draws]
    assert_matches_reference(linear_token_logprobs, cases, ["hidden", "weight"], backend="torch", chunk_rows=100)


def edge_rows() -> Case:
    """-inf among finite logits, at the target, everywhere; one huge logit at and off the target; |logit| of 1e4."""
    case = logits_case(9, 37, seed=4)
    logits, targets = case["logits"], case["targets"]
    logits[0, ::2], targets[0] = -INF, 1
    logits[1, targets[1]] = -INF
    logits[2] = -INF
    logits[3, targets[3]] = 70_000.0
    logits[4, (targets[4] + 1) % 37] = 70_000.0
    logits[5] *= 1e4
    logits[6], targets[6] = -INF, 5
    logits[6, 5] = 2.0
    logits[7] = 1e4 + torch.linspace(-1, 1, 37)
    logits[8] = -1e4
    return case


def test_edge_rows() -> None:
    case = edge_rows()
    # each row alone, too: beside a logit of 70,000 no other error counts
    for row in range(9):
        one = {name: value[row : row + 1] for name, value in case.items()}
        assert_matches_reference(token_logprobs, [one], ["logits"], backend="torch")
    assert_matches_reference(token_logprobs, [case], ["logits"], backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_logits_by_the_contract(backend: str) -> None:
    case = edge_rows()
    logits = case["logits"].requires_grad_()
    token = token_logprobs(logits, case["targets"], backend=backend)
    assert token.logprobs[[1, 2]].tolist() == [-INF, -INF]
    assert token.entropy[2] == 0.0
    assert token.lse[2] == -INF
    assert not any(x.isnan().any() for x in token)
    (d_logits,) = torch.autograd.grad([token.logprobs], [logits], [torch.ones(9)])
    assert d_logits.isfinite().all()
    assert not d_logits[[1, 2]].any()
    # the one possible token is certain
    assert token.logprobs[6] == 0.0
    assert token.entropy[6] == 0.0


def test_large_logits_keep_the_small_term() -> None:
    # 130 equal logits of 1e4: float32 cannot hold 1e4 + log(130), the pair (row_max, log_sum) can
    logits = torch.full((1, 130), 1e4)
    token = token_logprobs(logits, torch.tensor([7]))
    assert token.logprobs.item() == pytest.approx(-torch.tensor(130.0).double().log().item(), rel=1e-7)


def test_rows_that_nothing_flows_back_to_are_not_read() -> None:
    case = head_case(6, 11, 4)
    case["hidden"][2] = float("nan")
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    token = linear_token_logprobs(hidden, weight, case["targets"])
    kept = torch.tensor([0, 1, 3, 4, 5])
    (token.logprobs[kept].sum() + token.entropy[kept].sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert not hidden.grad[2].any()


def test_strided_inputs() -> None:
    case = head_case(13, 29, 6)
    wide = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in case.items()}
    assert not wide["hidden"].is_contiguous()
    assert_matches_reference(linear_token_logprobs, [wide], ["hidden", "weight", "bias"], backend="torch")
    transposed = {**logits_case(13, 29), "logits": logits_case(29, 13)["logits"].T}
    assert_matches_reference(token_logprobs, [transposed], ["logits"], backend="torch")


def test_int32_targets_are_int64_targets() -> None:
    case = logits_case(5, 9)
    narrow = token_logprobs(case["logits"], case["targets"].int())
    assert torch.equal(narrow.logprobs, token_logprobs(**case).logprobs)


def test_only_what_is_needed_is_computed() -> None:
    case = head_case(4, 9, 3)
    statistics = torch.ops.gtpo_kernels.linear_token_logprobs(
        case["hidden"], case["weight"], case["bias"], case["targets"], 1.0, None, None, "torch"
    )
    d_hidden, d_weight, d_bias = torch.ops.gtpo_kernels.linear_token_logprobs_backward(
        torch.ones(4), None, *case.values(), 1.0, None, None, *statistics, True, False, False, "torch"
    )
    assert (d_hidden.shape, d_weight.numel(), d_bias.numel()) == ((4, 3), 0, 0)
    hidden = case["hidden"].requires_grad_()
    linear_token_logprobs(hidden, case["weight"], case["targets"]).logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    assert case["weight"].grad is None


@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 9),
    vocab=st.integers(1, 40),
    constant=st.floats(-50.0, 50.0),
)
def test_laws(seed: int, num_rows: int, vocab: int, constant: float) -> None:
    case = logits_case(num_rows, vocab, seed=seed, dtype=torch.float64)
    token = token_logprobs(**case)
    assert (token.logprobs <= 0).all()
    assert (token.entropy > -1e-12).all()
    assert (token.entropy <= torch.tensor(float(vocab)).double().log() + 1e-12).all()
    # a constant added to a row's logits moves its lse only
    moved = token_logprobs(case["logits"] + constant, case["targets"])
    torch.testing.assert_close(moved.logprobs, token.logprobs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(moved.entropy, token.entropy, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(moved.lse, token.lse + constant, atol=1e-12, rtol=1e-12)
    # rows know nothing of each other
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    shuffled = token_logprobs(case["logits"][order], case["targets"][order])
    for one, other in zip(shuffled, token, strict=True):
        torch.testing.assert_close(one, other[order], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("chunk_rows", [1, 7, 52, 1000])
def test_chunk_size_changes_rounding_only(chunk_rows: int) -> None:
    case = head_case(52, 77, 20)
    assert_matches_reference(
        linear_token_logprobs, [case], ["hidden", "weight", "bias"], backend="torch", chunk_rows=chunk_rows
    )


def test_a_repeat_is_bitwise_equal() -> None:
    def run() -> list[Tensor]:
        case = {
            name: x.requires_grad_() if x.is_floating_point() else x for name, x in head_case(252, 507, 123).items()
        }
        token = linear_token_logprobs(**case, chunk_rows=64)
        (token.logprobs.sum() + token.entropy.sum()).backward()
        return [*(x.detach() for x in token), case["hidden"].grad, case["weight"].grad, case["bias"].grad]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    case = head_case(4, 6, 3, dtype=torch.float64)
    temperature = row_temperature(4).double()
    hidden, weight, bias = (case[name].requires_grad_() for name in ("hidden", "weight", "bias"))

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"bias": bias, "temperature": temperature, "backend": backend}
        return linear_token_logprobs(hidden, weight, case["targets"], **options)[:2]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))
    logits = logits_case(3, 5, dtype=torch.float64)["logits"].requires_grad_()
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, targets, temperature=1.3, backend=backend)[:2], (logits,)
    )


def test_opcheck() -> None:
    case = head_case(5, 7, 3)
    head = tuple(case[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    targets, temperature, ops = case["targets"], row_temperature(5), torch.ops.gtpo_kernels
    logits = logits_case(5, 7)["logits"].requires_grad_()
    calls = [
        (ops.token_logprobs, (logits, targets, 1.0, temperature, "torch")),
        (ops.linear_token_logprobs, (*head, targets, 0.7, None, 2, "torch")),
        (ops.linear_token_logprobs, (head[0], head[1].detach(), None, targets, 0.7, None, None, "torch")),
    ]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}
    with torch.no_grad():
        plain = tuple(x.detach() for x in head)
        grads = (torch.randn(5), torch.randn(5))
        rows = ops.token_logprobs(logits.detach(), targets, 1.0, None, "torch")
        backward = (*grads, logits.detach(), targets, 1.0, None, *rows, "torch")
        assert set(torch.library.opcheck(ops.token_logprobs_backward.default, backward).values()) == {"SUCCESS"}
        rows = ops.linear_token_logprobs(*plain, targets, 1.0, None, None, "torch")
        backward = (*grads, *plain, targets, 1.0, None, None, *rows, True, False, True, "torch")
        assert set(torch.library.opcheck(ops.linear_token_logprobs_backward.default, backward).values()) == {"SUCCESS"}


def test_compiled_whole() -> None:
    case = head_case(9, 17, 5)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        token = linear_token_logprobs(hidden, weight, case["targets"], temperature=0.8)
        return token.logprobs.sum() - 0.1 * token.entropy.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


GOOD_HEAD = head_case(3, 5, 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\], got shape \(3,\)"),
        ({"hidden": torch.zeros(3, 2).int()}, "hidden must be float32, float64, bfloat16, float16, got int32"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, D\] = \[any, 2\], got shape \(5, 3\)"),
        (
            {"weight": torch.zeros(5, 2).double()},
            "weight must have the dtype of hidden, torch.float32, got torch.float64",
        ),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] = \[5\], got shape \(4,\)"),
        ({"targets": torch.zeros(4).long()}, r"targets must be \[N\] = \[3\], got shape \(4,\)"),
        ({"targets": torch.zeros(3)}, "targets must be int32, int64, got float32"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets must lie in \[0, 5\), got values from 0 to 5"),
        ({"targets": torch.zeros(3).long().to("meta")}, "targets must be on cpu, got meta"),
        ({"targets": [0, 1, 2]}, r"targets must be a tensor \[N\], got list"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": torch.ones(2)}, r"temperature must be \[N\] = \[3\], got shape \(2,\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be positive and finite"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"backend": "cuda"}, "backend must be one of 'reference', 'torch', 'cpp', got 'cuda'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**{**GOOD_HEAD, "backend": backend, **bad})


def test_bad_logits_and_backends_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, V\], got shape \(3,\)"):
        token_logprobs(torch.zeros(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"logits must have a vocabulary of at least 1, got shape \(0, 0\)"):
        token_logprobs(torch.zeros(0, 0), torch.zeros(0).long())
    with pytest.raises(BackendUnavailable, match="backend='cpp' has no kernel for token_logprobs"):
        token_logprobs(torch.zeros(1, 3), torch.zeros(1).long(), backend="cpp")
