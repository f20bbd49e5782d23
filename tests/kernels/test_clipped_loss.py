"""`clipped_loss`, held against its definition and against numbers worked by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import clipped_loss
from gtpo_kernels.testing import assert_matches_reference, recomputed
from tests.kernels.conftest import (
    CLIPPED,
    INF,
    NAN,
    Case,
    assert_compiles,
    assert_equal,
    assert_opcheck,
    cpu_only,
    draws,
    examples,
    on_device,
    permutation,
    sizes,
    strided,
)

FAMILY = "clipped_loss"


def loss_case(num_tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Ratios on both sides of both clips, some advantages of 0, a loss mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(4, num_tokens, generator=generator, device="cpu")
    normal = torch.randn(2, num_tokens, generator=generator, device="cpu")
    logprobs = -3 * uniform[0]
    return on_device(
        {
            "logprobs": logprobs.to(dtype),
            "advantages": normal[0].masked_fill(uniform[1] < 0.2, 0.0).to(dtype),
            "loss_mask": uniform[2] < 0.8,
            "old_logprobs": (logprobs + 0.3 * normal[1]).to(dtype),
            "entropy": uniform[3].to(dtype),
        }
    )


def loss_and_gradient(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = case["logprobs"].clone().requires_grad_()
    loss = clipped_loss(**{**case, "logprobs": logprobs}, **options).loss
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


@sizes
def test_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, kernel: str) -> None:
    cases = draws(kernel, loss_case, shape[0], dtype=dtype, scalar=True)
    for metrics in ("active", "all"):
        assert_matches_reference(clipped_loss, cases, ["logprobs"], backend=kernel, metrics=metrics, clip_low=0.1)
    without = [{**case, "old_logprobs": None, "entropy": None, "loss_mask": None} for case in cases]
    assert_matches_reference(clipped_loss, without, ["logprobs"], backend=kernel, num_loss_tokens=7)


def test_strided_inputs(kernel: str) -> None:
    case = {name: strided(value) for name, value in loss_case(20, dtype=torch.float64).items()}
    assert not case["logprobs"].is_contiguous()
    assert_matches_reference(clipped_loss, [case], ["logprobs"], backend=kernel)


def test_a_repeat_is_bitwise_equal(kernel: str) -> None:
    case = loss_case(3000)
    assert_equal(*(loss_and_gradient(case, backend=kernel) for _ in range(2)))


def test_every_branch_by_hand(backend: str) -> None:
    # (log ratio, advantage) -> (surrogate, d surrogate / d logprob), clip 0.2 / 0.28
    rows = [
        (0.0, 2.0, 2.0, 2.0),
        (math.log(1.5), 1.0, 1.28, 0.0),  # clipped high
        (math.log(1.5), -1.0, -1.5, -1.5),  # a worse action made likelier: the gradient stays
        (math.log(0.5), -1.0, -0.8, 0.0),  # clipped low
        (math.log(0.5), 1.0, 0.5, 0.5),
        (25.0, -1.0, -math.exp(20.0), 0.0),  # clamped
        (-25.0, 1.0, math.exp(-20.0), 0.0),
    ]
    for log_ratio, advantage, surrogate, slope in rows:
        case = {
            "logprobs": torch.tensor([-2.0], dtype=torch.float64),
            "advantages": torch.tensor([advantage], dtype=torch.float64),
            "old_logprobs": torch.tensor([-2.0 - log_ratio], dtype=torch.float64),
        }
        loss, gradient = loss_and_gradient(case, backend=backend, num_loss_tokens=4)
        assert loss.item() == pytest.approx(-surrogate / 4, rel=1e-12)
        assert gradient.item() == pytest.approx(-slope / 4, rel=1e-12)


def test_metrics_by_hand(backend: str) -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.0, 9.0], dtype=torch.float64)
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -INF, NAN], dtype=torch.float64)
    _, metrics = clipped_loss(
        logprobs,
        torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
        loss_mask=torch.tensor([True] * 6 + [False]),
        old_logprobs=logprobs - ratio.log(),
        entropy=torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 9.0, NAN], dtype=torch.float64),
        backend=backend,
    )
    k1 = -(math.log(1.5) + math.log(0.5)) / 2
    expected = {
        "clip_low_fraction": 0.25,
        "clip_high_fraction": 0.25,
        "approx_kl_k1": k1,
        "approx_kl_k3": k1,  # the mean ratio is 1
        "entropy": 0.25,
        "ratio_mean": 1.0,
        "ratio_max": 1.5,
        "logprob_mean": -2.5,
        "num_active_tokens": 5.0,
        "dropped_tokens": 1.0,
        "nonfinite_tokens": 1.0,
    }
    found = {name: value.item() for name, value in metrics._asdict().items() if value is not None}
    assert found == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad for value in metrics if value is not None)


def test_what_lies_under_the_mask_is_never_read(backend: str) -> None:
    case = loss_case(40, seed=3)
    hidden = ~case["loss_mask"]
    clean = loss_and_gradient(case, backend=backend)
    for poison in (NAN, INF, -INF):
        poisoned = {name: x.masked_fill(hidden, poison) if x.is_floating_point() else x for name, x in case.items()}
        loss, gradient = loss_and_gradient(poisoned, backend=backend)
        assert torch.equal(loss, clean[0])
        assert torch.equal(gradient, clean[1])


def test_infinite_logprobs_have_no_loss_and_no_gradient(backend: str) -> None:
    case: Case = {
        "logprobs": torch.tensor([-INF, -1.0, -INF, -1.0]),
        "advantages": torch.tensor([1.0, -1.0, -1.0, 1.0]),
        "old_logprobs": torch.tensor([-1.0, -INF, -INF, -1.0]),
    }
    loss, gradient = loss_and_gradient(case, backend=backend)
    assert loss.item() == -0.25
    assert gradient.tolist() == [0.0, 0.0, 0.0, -0.25]
    assert clipped_loss(**case, backend=backend).metrics.nonfinite_tokens == 3


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_active_tokens_all_is_zero(num_tokens: int, backend: str) -> None:
    for advantage, masked in ((NAN, True), (0.0, False)):
        case = {
            "logprobs": torch.full((num_tokens,), -1.0),
            "advantages": torch.full((num_tokens,), advantage),
            "loss_mask": torch.full((num_tokens,), not masked),
        }
        loss, gradient = loss_and_gradient(case, backend=backend)
        assert loss == 0
        assert not gradient.any()
        metrics = clipped_loss(**case, entropy=torch.zeros(num_tokens), backend=backend).metrics
        dropped = metrics.dropped_tokens
        assert dropped == (0 if masked else num_tokens)
        assert not any(value.any() for value in metrics._replace(dropped_tokens=loss) if value is not None)


def test_a_nan_inside_the_mask_is_not_hidden(backend: str) -> None:
    case = {"logprobs": torch.tensor([NAN, -1.0]), "advantages": torch.ones(2), "old_logprobs": torch.zeros(2)}
    assert loss_and_gradient(case, backend=backend)[0].isnan()


def test_zero_advantage_tokens_stay_in_the_denominator(backend: str) -> None:
    case = {"logprobs": torch.full((4,), -1.0), "advantages": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    assert loss_and_gradient(case, backend=backend)[0] == -0.25


def test_metrics_of_all_tokens(backend: str) -> None:
    case = {"logprobs": torch.tensor([-1.0, -3.0]), "advantages": torch.tensor([1.0, 0.0])}
    assert clipped_loss(**case, backend=backend).metrics.logprob_mean == -1.0
    everything = clipped_loss(**case, metrics="all", backend=backend).metrics
    assert everything.logprob_mean == -2.0
    assert (everything.num_active_tokens, everything.dropped_tokens) == (2.0, 0.0)


def test_laws(kernel: str) -> None:
    @settings(max_examples=examples(kernel, 60))
    @given(seed=st.integers(0, 2**31), num_tokens=st.integers(1, 30), parts=st.integers(1, 4))
    def laws(seed: int, num_tokens: int, parts: int) -> None:
        case = loss_case(num_tokens, seed=seed, dtype=torch.float64)
        loss, gradient = loss_and_gradient(case, backend=kernel)
        order = permutation(num_tokens, seed)
        shuffled = loss_and_gradient({name: x[order] for name, x in case.items()}, backend=kernel)
        torch.testing.assert_close(shuffled[0], loss)
        torch.testing.assert_close(shuffled[1], gradient[order])
        # micro-batches with a common denominator add up to the whole
        total = case["loss_mask"].sum()
        pieces = [{name: x[part::parts] for name, x in case.items()} for part in range(parts)]
        losses = [loss_and_gradient(piece, num_loss_tokens=total, backend=kernel) for piece in pieces]
        torch.testing.assert_close(torch.stack([one for one, _ in losses]).sum(), loss)
        for part, (_, piece_gradient) in enumerate(losses):
            torch.testing.assert_close(piece_gradient, gradient[part::parts])
        # twice the advantage, twice the loss
        doubled = loss_and_gradient({**case, "advantages": 2 * case["advantages"]}, backend=kernel)
        torch.testing.assert_close(doubled[1], 2 * gradient)

    laws()


def test_gradcheck(backend: str) -> None:
    case = loss_case(12, seed=1, dtype=torch.float64)
    logprobs = case.pop("logprobs").requires_grad_()
    loss = recomputed(lambda x: clipped_loss(x, **case, backend=backend).loss)
    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_gradient_flows_to_logprobs_only(backend: str) -> None:
    case = loss_case(5)
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in case.items()}
    clipped_loss(**leaves, backend=backend).loss.backward()
    assert leaves["logprobs"].grad is not None
    assert all(leaves[name].grad is None for name in ("advantages", "old_logprobs", "entropy"))


def test_a_second_backward_is_refused(kernel: str) -> None:
    case = loss_case(5)
    loss = clipped_loss(**{**case, "logprobs": case["logprobs"].requires_grad_()}, backend=kernel).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_opcheck(kernel: str) -> None:
    logprobs, advantages, mask, old_logprobs, entropy = loss_case(6).values()
    op, leaf = torch.ops.gtpo_kernels.clipped_loss, logprobs.clone().requires_grad_()
    # opcheck's upstream gradient has the sign of the loss: both signs, or a kept gradient scaled by 1 would hide
    for signed in (advantages.abs(), -advantages.abs()):
        rows = (leaf, entropy, signed, mask, old_logprobs)
        assert_opcheck(op, *rows, torch.tensor(9.0), *CLIPPED, False, True, False, kernel)
    bare = (logprobs, None, advantages, mask, None, None)
    assert_opcheck(op, *bare, *CLIPPED, True, False, False, kernel)


def test_compiled_whole(kernel: str) -> None:
    case = loss_case(20, seed=2)

    def run(logprobs: Tensor) -> Tensor:
        loss, metrics = clipped_loss(**{**case, "logprobs": logprobs}, backend=kernel)
        return 3 * loss + metrics.ratio_mean

    assert_compiles(run, case["logprobs"])


@cpu_only
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logprobs": torch.zeros(3, 1)}, r"logprobs must be \[N\], got shape \(3, 1\)"),
        ({"advantages": torch.zeros(4)}, r"advantages must be \[N\] = \[3\], got shape \(4,\)"),
        ({"advantages": torch.zeros(3).long()}, "advantages must be float32, float64, bfloat16, float16, got int64"),
        ({"loss_mask": torch.ones(3)}, "loss_mask must be bool, got float32"),
        ({"old_logprobs": torch.ones(2)}, r"old_logprobs must be \[N\] = \[3\], got shape \(2,\)"),
        ({"entropy": torch.ones(2)}, r"entropy must be \[N\] = \[3\], got shape \(2,\)"),
        ({"clip_low": 1.5}, r"clip_low must lie in \[0, 1\], got 1.5"),
        ({"clip_high": -0.1}, r"clip_high must lie in \[0, inf\], got -0.1"),
        ({"clip_high": NAN}, "clip_high must lie in"),
        ({"num_loss_tokens": -1}, "num_loss_tokens must be 0 or more and finite, got -1"),
        ({"num_loss_tokens": torch.tensor(-1.0)}, "num_loss_tokens must be 0 or more and finite"),
        ({"num_loss_tokens": torch.ones(2)}, r"num_loss_tokens must be one number, got shape \(2,\)"),
        ({"metrics": "some"}, "metrics must be one of 'active', 'all', got 'some'"),
        ({"backend": "mps"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    good = {"logprobs": torch.zeros(3), "advantages": torch.zeros(3), "backend": backend}
    with pytest.raises(ValueError, match=message):
        clipped_loss(**{**good, **bad})
