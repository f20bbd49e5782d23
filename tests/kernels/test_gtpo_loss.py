"""`gtpo_loss` and `linear_gtpo_loss`, held against their definition, and against per-token op + eager loss."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import (
    BackendUnavailable,
    TurnCredit,
    clipped_loss,
    gtpo_loss,
    linear_gtpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from gtpo_kernels.testing import assert_matches_reference, assert_within_budget, recomputed, run_trial

INF, NAN = float("inf"), float("nan")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
HEAD = ["hidden", "weight", "bias"]
ROWS = ("targets", "advantages", "loss_mask", "old_logprobs")
Case = dict[str, Any]


def loss_case(num_rows: int, vocab: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """A head and rows with ratios around 1, some advantages of 0, a loss mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    targets = torch.randint(vocab, (num_rows,), generator=generator)
    advantages = torch.randn(num_rows, generator=generator)
    advantages[torch.rand(num_rows, generator=generator) < 0.2] = 0.0
    logprobs = linear_token_logprobs(hidden.float(), weight.float(), targets, bias=bias.float()).logprobs
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": advantages,
        "bias": bias,
        "loss_mask": torch.rand(num_rows, generator=generator) < 0.8,
        "old_logprobs": logprobs + 0.3 * torch.randn(num_rows, generator=generator),
    }


def logits_case(num_rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    case = loss_case(num_rows, vocab, 5, seed=seed)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    return {"logits": logits.to(dtype), **{name: case[name] for name in ROWS}}


def draws(make: Any, *shape: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Several cases, because the loss is one number each; see `assert_matches_reference`."""
    return [make(*shape, seed=seed, dtype=dtype) for seed in range(6 if shape[0] > 100 else 16)]


def loss_and_gradients(op: Any, case: Case, names: list[str], **options: Any) -> list[Tensor]:
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    loss = op(**{**case, **leaves}, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(252, 507, 123), (1, 130, 5), (5, 1, 3), (0, 7, 4)])
def test_from_hidden_states(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases = draws(loss_case, *shape, dtype=dtype)
    temperature = torch.linspace(0.5, 2.0, shape[0])
    assert_matches_reference(linear_gtpo_loss, cases, HEAD, backend="torch", chunk_rows=100)
    warmer = [{**case, "temperature": temperature} for case in cases]
    assert_matches_reference(linear_gtpo_loss, warmer, HEAD, backend="torch", metrics="all", num_loss_tokens=50)
    plain = [{**case, "bias": None, "loss_mask": None, "old_logprobs": None} for case in cases]
    assert_matches_reference(linear_gtpo_loss, plain, HEAD[:2], backend="torch", temperature=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(252, 507), (1, 130), (3, 1), (0, 7)])
def test_from_logits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    cases = draws(logits_case, *shape, dtype=dtype)
    assert_matches_reference(gtpo_loss, cases, ["logits"], backend="torch", temperature=1.3)
    warmer = [{**case, "temperature": torch.linspace(0.5, 2.0, shape[0])} for case in cases]
    assert_matches_reference(gtpo_loss, warmer, ["logits"], backend="torch", metrics="all", num_loss_tokens=50)


def composed(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str, **rest: Any) -> Any:
    """The per-token op, then the eager loss."""
    temperature = rest.pop("temperature", 1.0)
    token = linear_token_logprobs(
        hidden, weight, rest.pop("targets"), bias=bias, temperature=temperature, backend=backend
    )
    return clipped_loss(token.logprobs, entropy=token.entropy, backend=backend, **rest)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"old_logprobs": None},
        {"loss_mask": None},
        {"bias": None},
        {"temperature": 0.6},
        {"temperature": torch.linspace(0.5, 2.0, 60)},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"num_loss_tokens": 1000},
        {"num_loss_tokens": torch.tensor(17)},
        {"metrics": "all"},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_fused_is_the_per_token_op_and_the_eager_loss(options: Case) -> None:
    cases = [{**case, **options} for case in draws(loss_case, 60, 37, 11)]
    names = [name for name in HEAD if cases[0][name] is not None]
    exact, fused, eager = ([] for _ in range(3))
    for case in cases:
        exact.append(run_trial(composed, case, names, torch.float64, {"backend": "reference"}))
        eager.append(run_trial(composed, case, names, None, {"backend": "reference"}))
        fused.append(run_trial(linear_gtpo_loss, case, names, None, {"backend": "torch"}))
    for name in names:
        columns = (torch.stack([trial.gradients[name] for trial in trials]) for trials in (fused, eager, exact))
        assert_within_budget(*columns, f"d_{name}")
    for name in exact[0].outputs:
        columns = (torch.stack([trial.outputs[name] for trial in trials]) for trials in (fused, eager, exact))
        assert_within_budget(*columns, name)


def test_from_logits_is_from_hidden_states() -> None:
    case = loss_case(40, 23, 7, dtype=torch.float64)
    logits = (case["hidden"] @ case["weight"].T + case["bias"]).requires_grad_()
    loss, d_logits = loss_and_gradients(
        gtpo_loss, {"logits": logits, **{name: case[name] for name in ROWS}}, ["logits"]
    )
    fused = loss_and_gradients(linear_gtpo_loss, case, HEAD)
    assert_close(fused, [loss, d_logits @ case["weight"], d_logits.T @ case["hidden"], d_logits.sum(dim=0)])


def edge_rows() -> Case:
    """-inf among finite logits, at the target, everywhere; one huge logit at and off the target; |logit| of 1e4."""
    case = logits_case(7, 37, seed=4)
    logits, targets = case["logits"], case["targets"]
    logits[0, ::2], targets[0] = -INF, 1
    logits[1, targets[1]] = -INF
    logits[2] = -INF
    logits[3, targets[3]] = 70_000.0
    logits[4, (targets[4] + 1) % 37] = 70_000.0
    logits[5] *= 1e4
    logits[6] = 1e4 + torch.linspace(-1, 1, 37)
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.5, -0.5, 1.0, -1.0])
    return {"logits": logits, "targets": targets, "advantages": advantages}


def test_edge_rows() -> None:
    case = edge_rows()
    assert_matches_reference(gtpo_loss, [case], ["logits"], backend="torch")
    # each row alone, too: beside a logit of 70,000 no other error counts
    for row in range(7):
        one = {name: value[row : row + 1] for name, value in case.items()}
        assert_matches_reference(gtpo_loss, [one], ["logits"], backend="torch")


@BACKENDS
def test_infinite_rows_have_no_loss_and_no_gradient(backend: str) -> None:
    case = edge_rows()
    logits = case["logits"].requires_grad_()
    loss, metrics = gtpo_loss(**case, backend=backend)
    loss.backward()
    assert metrics.nonfinite_tokens == 2
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[1:3].any()
    # ratios are 1, so the loss is the mean of -advantage; two rows of seven have none
    assert loss.item() == pytest.approx(-(case["advantages"].sum() - case["advantages"][1:3].sum()).item() / 7)


@BACKENDS
def test_what_lies_outside_the_active_rows_is_never_read(backend: str) -> None:
    case = loss_case(30, 19, 6, seed=2)
    clean = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=backend)
    masked = ~case["loss_mask"]
    silent = masked | (case["advantages"] == 0)
    for poison in (NAN, INF, -INF):
        poisoned = {
            **case,
            "hidden": case["hidden"].masked_fill(silent[:, None], poison),
            "advantages": case["advantages"].masked_fill(masked, poison),
            "old_logprobs": case["old_logprobs"].masked_fill(silent, poison),
            "targets": case["targets"].masked_fill(silent, -100),
            "temperature": torch.ones(30).masked_fill(silent, poison),
        }
        assert_close(loss_and_gradients(linear_gtpo_loss, poisoned, HEAD, backend=backend), clean)


@BACKENDS
@pytest.mark.parametrize("op", [gtpo_loss, linear_gtpo_loss])
def test_without_active_rows_all_is_zero(op: Any, backend: str) -> None:
    case: Case = loss_case(6, 5, 3) if op is linear_gtpo_loss else logits_case(6, 5)
    names = [name for name in ("hidden", "weight", "bias", "logits") if name in case]
    for silence in ({"loss_mask": torch.zeros(6, dtype=torch.bool)}, {"advantages": torch.zeros(6)}):
        results = loss_and_gradients(op, {**case, **silence}, names, backend=backend)
        assert not any(result.any() for result in results)
        assert op(**{**case, **silence}, backend=backend).metrics.num_active_tokens == 0


def test_strided_inputs() -> None:
    case = loss_case(13, 29, 6)
    wide = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in case.items()}
    assert not wide["hidden"].is_contiguous()
    assert_matches_reference(linear_gtpo_loss, [wide], HEAD, backend="torch")
    transposed = logits_case(13, 29)
    transposed["logits"] = transposed["logits"].T.contiguous().T
    assert_matches_reference(gtpo_loss, [transposed], ["logits"], backend="torch")


def test_no_gradient_is_allocated_for_a_frozen_weight() -> None:
    case = loss_case(6, 9, 4)
    rows = (*(case[name] for name in ROWS), 1.0, None, None, 0.2, 0.28, False, None)
    head = tuple(case[name] for name in HEAD)
    outputs = torch.ops.gtpo_kernels.linear_gtpo_loss(*head, *rows, True, False, False, False, "torch")
    assert [x.numel() for x in outputs[2:]] == [24, 0, 0]
    case["hidden"].requires_grad_()
    linear_gtpo_loss(**case).loss.backward()
    assert case["hidden"].grad is not None
    assert case["hidden"].grad.any()
    assert case["weight"].grad is None
    with torch.no_grad():
        assert not linear_gtpo_loss(**case).loss.requires_grad


@pytest.mark.parametrize("chunk_rows", [1, 7, 60, 1000])
def test_chunk_size_changes_rounding_only(chunk_rows: int) -> None:
    cases = draws(loss_case, 60, 37, 11)
    assert_matches_reference(linear_gtpo_loss, cases, HEAD, backend="torch", chunk_rows=chunk_rows)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 12), vocab=st.integers(1, 20), parts=st.integers(1, 4))
def test_laws(seed: int, num_rows: int, vocab: int, parts: int) -> None:
    case = loss_case(num_rows, vocab, 3, seed=seed, dtype=torch.float64)
    rows = ("hidden", *ROWS)
    whole = loss_and_gradients(linear_gtpo_loss, case, HEAD)
    # the order of the rows does not matter
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    shuffled = loss_and_gradients(linear_gtpo_loss, {**case, **{name: case[name][order] for name in rows}}, HEAD)
    assert_close(shuffled, [whole[0], whole[1][order], *whole[2:]])
    # a constant added to all logits changes nothing
    moved = loss_and_gradients(linear_gtpo_loss, {**case, "bias": case["bias"] + 5.0}, HEAD)
    assert_close(moved, whole)
    # micro-batches with a common denominator add up to the whole batch
    total = int(case["loss_mask"].sum())
    pieces = [
        loss_and_gradients(
            linear_gtpo_loss, {**case, **{name: case[name][part::parts] for name in rows}}, HEAD, num_loss_tokens=total
        )
        for part in range(parts)
    ]
    for i in (0, 2, 3):
        torch.testing.assert_close(torch.stack([piece[i] for piece in pieces]).sum(dim=0), whole[i])
    for part, piece in enumerate(pieces):
        torch.testing.assert_close(piece[1], whole[1][part::parts])


def turn_credit() -> TurnCredit:
    """Two trajectories of two turns: 12 tokens, some of them prompt and tool output."""
    return TurnCredit(
        turn_rewards=torch.tensor([-0.1, 1.0, 0.0, 0.0]),
        cu_turns=torch.tensor([0, 2, 4]),
        group_ids=torch.tensor([3, 3]),
        turn_ids=torch.tensor([-1, 0, 0, -1, 1, 1, -1, 2, -1, 3, 3, 3]),
        gamma=0.8,
    )


@BACKENDS
def test_turn_credit_is_its_advantages_and_mask(backend: str) -> None:
    credit = turn_credit()
    case = loss_case(12, 9, 4, seed=5)
    del case["loss_mask"]
    by_turn = loss_and_gradients(linear_gtpo_loss, {**case, "advantages": credit}, HEAD, backend=backend)
    per_token = {**case, "advantages": credit.advantages(), "loss_mask": credit.turn_ids >= 0}
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            by_turn, loss_and_gradients(linear_gtpo_loss, per_token, HEAD, backend=backend), strict=True
        )
    )
    # a mask of its own, of a truncated trajectory say, goes before the default
    narrower = {**case, "advantages": credit, "loss_mask": credit.turn_ids >= 2}
    assert linear_gtpo_loss(**narrower).metrics.num_active_tokens == 4


def test_a_repeat_is_bitwise_equal() -> None:
    case = loss_case(252, 507, 123)
    runs = [loss_and_gradients(linear_gtpo_loss, case, HEAD, chunk_rows=64) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@BACKENDS
def test_gradcheck(backend: str) -> None:
    case = loss_case(6, 7, 3, seed=1, dtype=torch.float64)
    case["temperature"] = torch.linspace(0.5, 2.0, 6)
    leaves = [case.pop(name).requires_grad_() for name in HEAD]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gtpo_loss(hidden, weight, bias=bias, **case, backend=backend).loss

    assert torch.autograd.gradcheck(recomputed(run), leaves)
    case = logits_case(5, 4, seed=3, dtype=torch.float64)
    logits = case.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(recomputed(lambda x: gtpo_loss(x, **case, backend=backend).loss), (logits,))


def test_the_upstream_gradient_scales_and_a_second_backward_is_refused() -> None:
    case = loss_case(8, 9, 4)
    plain = loss_and_gradients(linear_gtpo_loss, case, HEAD)
    case["weight"].requires_grad_()
    loss = 0.25 * linear_gtpo_loss(**case).loss
    loss.backward(retain_graph=True)
    torch.testing.assert_close(case["weight"].grad, 0.25 * plain[2])
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


@BACKENDS
def test_autocast_does_not_reach_into_the_op(backend: str) -> None:
    case = loss_case(8, 9, 4)
    plain = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=backend)
    leaves = {name: case[name].clone().requires_grad_() for name in HEAD}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_gtpo_loss(**{**case, **leaves}, backend=backend).loss
    assert_close([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))], plain)


def test_opcheck() -> None:
    case = loss_case(6, 7, 3)
    ops = torch.ops.gtpo_kernels
    rows = tuple(case[name] for name in ROWS)
    head = tuple(case[name].requires_grad_() for name in HEAD)
    logits = logits_case(6, 7)["logits"].requires_grad_()
    temperature, denominator = torch.linspace(0.5, 2.0, 6), torch.tensor(9.0)
    everything, frozen = (True, True, True, False, "torch"), (True, False, False, False, "torch")
    calls = [
        (
            ops.linear_gtpo_loss,
            (head[0], head[1].detach(), None, *rows[:3], None, 1.0, None, None, 0.2, 0.28, False, None, *frozen),
        ),
    ]
    # opcheck's upstream gradient has the sign of the loss: both signs, or a kept gradient scaled by 1 would hide
    for sign in (1, -1):
        signed = (rows[0], sign * rows[1].abs(), *rows[2:])
        logits_call = (logits, *signed, 1.0, temperature, denominator, 0.2, 0.28, True, True, False, "torch")
        calls += [
            (ops.gtpo_loss, logits_call),
            (ops.linear_gtpo_loss, (*head, *signed, 0.7, None, None, 0.2, 0.28, False, 2, *everything)),
        ]
    for op, arguments in calls:
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_whole(frozen: bool) -> None:
    case = loss_case(12, 9, 4)
    del case["loss_mask"], case["advantages"]
    credit = turn_credit()
    names = HEAD[:1] if frozen else HEAD

    def run(leaves: dict[str, Tensor]) -> Tensor:
        loss, metrics = linear_gtpo_loss(**{**case, **leaves}, advantages=credit)
        return 3 * loss + metrics.ratio_mean

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = {name: case[name].clone().requires_grad_() for name in names}
        value = function(leaves)
        results.append([value.detach(), *torch.autograd.grad(value, list(leaves.values()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\], got shape \(3,\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, D\] = \[any, 2\], got shape \(5, 3\)"),
        ({"weight": torch.zeros(0, 2)}, "weight must have a vocabulary of at least 1"),
        ({"bias": torch.zeros(5).double()}, "bias must have the dtype of hidden"),
        ({"targets": torch.tensor([0, -1, 1])}, r"targets must lie in \[0, 5\), got values from -1 to 1"),
        ({"advantages": torch.zeros(4)}, r"advantages must be \[N\] = \[3\], got shape \(4,\)"),
        ({"advantages": turn_credit()}, r"advantages must be \[N\] = \[3\], got shape \(12,\)"),
        ({"loss_mask": torch.zeros(3)}, "loss_mask must be bool, got float32"),
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs must be \[N\] = \[3\]"),
        ({"temperature": INF}, "temperature must be positive and finite, got inf"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature must be positive and finite in every row"),
        ({"clip_low": -0.2}, r"clip_low must lie in \[0, 1\], got -0.2"),
        ({"num_loss_tokens": NAN}, "num_loss_tokens must be 0 or more and finite, got nan"),
        ({"num_loss_tokens": torch.tensor(NAN)}, "num_loss_tokens must be 0 or more and finite"),
        ({"metrics": "none"}, "metrics must be one of 'active', 'all', got 'none'"),
        ({"chunk_rows": -1}, "chunk_rows must be at least 1, got -1"),
        ({"backend": "fast"}, "backend must be one of 'reference', 'torch', 'cpp', got 'fast'"),
    ],
)
@BACKENDS
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    good = {
        "hidden": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "targets": torch.zeros(3).long(),
        "advantages": torch.ones(3),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_gtpo_loss(**{**good, **bad})


def test_bad_logits_and_backends_are_named() -> None:
    rows = (torch.zeros(1).long(), torch.ones(1))
    with pytest.raises(ValueError, match=r"logits must be \[N, V\], got shape \(1,\)"):
        gtpo_loss(torch.zeros(1), *rows)
    with pytest.raises(BackendUnavailable, match="backend='cpp' has no kernel for gtpo_loss"):
        gtpo_loss(torch.zeros(1, 3), *rows, backend="cpp")


def test_entropy_of_the_metrics_is_that_of_the_per_token_op() -> None:
    case = logits_case(20, 11, seed=8)
    active = case["loss_mask"] & (case["advantages"] != 0)
    entropy = token_logprobs(case["logits"], case["targets"]).entropy[active].mean()
    torch.testing.assert_close(gtpo_loss(**case).metrics.entropy, entropy)
