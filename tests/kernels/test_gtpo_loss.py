"""`gtpo_loss` and `linear_gtpo_loss`, held against their definition, and against per-token op + eager loss."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo_kernels import (
    ClippedLoss,
    TurnCredit,
    clipped_loss,
    gtpo_loss,
    linear_gtpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from gtpo_kernels.testing import assert_matches_reference, assert_within_budget, recomputed, run_trial
from tests.kernels.conftest import (
    CLIPPED,
    HEAD,
    INF,
    NAN,
    ROWS,
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
    interpreted,
    logits_loss_case,
    loss_and_gradients,
    loss_case,
    on_device,
    permutation,
    row_temperature,
    single_rows,
    sizes,
    strided,
)

FAMILY = "gtpo_loss"
ops = torch.ops.gtpo_kernels


@sizes
def test_from_hidden_states(shape: tuple[int, int, int], dtype: torch.dtype, kernel: str) -> None:
    num_rows, *widths = fit(kernel, *shape)

    def check(names: list[str], changes: Case, head: Case, **options: Any) -> None:
        cases = draws(kernel, loss_case, num_rows, *widths, dtype=dtype, scalar=True, **head)
        cases = [{**case, **changes} for case in cases]
        assert_matches_reference(linear_gtpo_loss, cases, names, backend=kernel, **options)

    warmer: Case = {"temperature": row_temperature(num_rows), "softcap": 4.0}
    check(HEAD, {}, warmer, metrics="all", num_loss_tokens=50, chunk_rows=100)
    check(HEAD[:2], {"bias": None, "loss_mask": None, "old_logprobs": None}, {"temperature": 0.7})


@sizes
def test_from_logits(shape: tuple[int, int, int], dtype: torch.dtype, kernel: str) -> None:
    num_rows, vocab = fit(kernel, *shape[:2])

    def check(head: Case, **options: Any) -> None:
        cases = draws(kernel, logits_loss_case, num_rows, vocab, dtype=dtype, scalar=True, **head)
        assert_matches_reference(gtpo_loss, cases, ["logits"], backend=kernel, **options)

    check({"temperature": 1.3, "softcap": 4.0})
    check({"temperature": row_temperature(num_rows)}, metrics="all", num_loss_tokens=50)


def composed(backend: str, temperature: float | Tensor = 1.0, softcap: float | None = None, **case: Any) -> ClippedLoss:
    """The per-token op, then the eager loss."""
    op = token_logprobs if "logits" in case else linear_token_logprobs
    arguments = {name: case.pop(name) for name in ("logits", *HEAD, "targets") if name in case}
    token = op(**arguments, temperature=temperature, softcap=softcap, backend=backend)
    return clipped_loss(token.logprobs, entropy=token.entropy, backend=backend, **case)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"old_logprobs": None},
        {"loss_mask": None},
        {"bias": None},
        {"temperature": 0.6},
        {"temperature": "per row"},
        {"softcap": 2.0},
        {"softcap": 5.0, "temperature": "per row"},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"num_loss_tokens": 1000},
        {"num_loss_tokens": torch.tensor(17)},
        {"metrics": "all"},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_fused_is_the_per_token_op_and_the_eager_loss(options: Case, kernel: str) -> None:
    num_rows, vocab, width = fit(kernel, 60, 37, 11)
    head = {name: value for name, value in options.items() if name in ("temperature", "softcap")}
    if head.get("temperature") == "per row":
        head["temperature"] = row_temperature(num_rows)
    options = {name: value for name, value in options.items() if name not in head}
    batches: list[tuple[Any, list[Case], list[str]]] = [
        (linear_gtpo_loss, draws(kernel, loss_case, num_rows, vocab, width, scalar=True, **head), HEAD)
    ]
    if "bias" not in options:
        batches.append((gtpo_loss, draws(kernel, logits_loss_case, num_rows, vocab, scalar=True, **head), ["logits"]))
    for op, cases, leaves in batches:
        cases = [on_device({**case, **options}) for case in cases]
        names = [name for name in leaves if cases[0][name] is not None]
        fused = [run_trial(op, case, names, None, {"backend": kernel}) for case in cases]
        eager = [run_trial(composed, case, names, None, {"backend": "reference"}) for case in cases]
        exact = [run_trial(composed, case, names, torch.float64, {"backend": "reference"}) for case in cases]
        for kind in ("outputs", "gradients"):
            for name in getattr(exact[0], kind):
                columns = (torch.stack([getattr(t, kind)[name] for t in trials]) for trials in (fused, eager, exact))
                assert_within_budget(*columns, name)


def test_from_logits_is_from_hidden_states(kernel: str) -> None:
    case = loss_case(11, 23, 7, dtype=torch.float64)
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    rows = {name: case[name] for name in ROWS}
    loss, d_logits = loss_and_gradients(gtpo_loss, {"logits": logits, **rows}, ["logits"], backend=kernel)
    fused = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel)
    assert_close(fused, [loss, d_logits @ case["weight"], d_logits.T @ case["hidden"], d_logits.sum(dim=0)])


def edge_rows() -> Case:
    return {**edge_logits(), "advantages": torch.tensor([1.0, -1.0, 1.0, 0.5, -0.5, 1.0, -1.0, 0.5, -1.0])}


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_edge_rows(softcap: float | None, kernel: str) -> None:
    case = edge_rows()
    for one in (case, *single_rows(case)):
        assert_matches_reference(gtpo_loss, [one], ["logits"], backend=kernel, softcap=softcap)


def test_infinite_rows_have_no_loss_and_no_gradient(backend: str) -> None:
    case = edge_rows()
    logits = case["logits"].requires_grad_()
    loss, metrics = gtpo_loss(**case, backend=backend)
    loss.backward()
    assert metrics.nonfinite_tokens == 2
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[1:3].any()
    # ratios are 1, so the loss is the mean of -advantage; two rows of nine have none
    assert loss.item() == pytest.approx(-(case["advantages"].sum() - case["advantages"][1:3].sum()).item() / 9)


def test_what_lies_outside_the_active_rows_is_never_read(backend: str) -> None:
    case = loss_case(13, 19, 6, seed=2)
    clean = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=backend)
    masked = ~case["loss_mask"]
    silent = masked | (case["advantages"] == 0)
    assert silent.any()
    for poison in (NAN, INF, -INF):
        poisoned = {
            **case,
            "hidden": case["hidden"].masked_fill(silent[:, None], poison),
            "advantages": case["advantages"].masked_fill(masked, poison),
            "old_logprobs": case["old_logprobs"].masked_fill(silent, poison),
            "targets": case["targets"].masked_fill(silent, -100),
            "temperature": torch.ones(13).masked_fill(silent, poison),
        }
        assert_close(loss_and_gradients(linear_gtpo_loss, poisoned, HEAD, backend=backend), clean)


@pytest.mark.parametrize("op", [gtpo_loss, linear_gtpo_loss])
def test_without_active_rows_all_is_zero(op: Any, backend: str) -> None:
    case: Case = loss_case(6, 5, 3) if op is linear_gtpo_loss else logits_loss_case(6, 5)
    names = [name for name in ("hidden", "weight", "bias", "logits") if name in case]
    for silence in ({"loss_mask": torch.zeros(6, dtype=torch.bool)}, {"advantages": torch.zeros(6)}):
        results = loss_and_gradients(op, {**case, **silence}, names, backend=backend)
        assert not any(result.any() for result in results)
        assert op(**{**case, **silence}, backend=backend).metrics.num_active_tokens == 0


def test_strided_inputs(kernel: str) -> None:
    cases = draws(kernel, loss_case, 13, 29, 6, scalar=True)
    wide = [{name: strided(value) for name, value in case.items()} for case in cases]
    assert not wide[0]["hidden"].is_contiguous()
    assert_matches_reference(linear_gtpo_loss, wide, HEAD, backend=kernel)
    cases = draws(kernel, logits_loss_case, 13, 29, scalar=True)
    for rearranged in (lambda logits: logits.T.contiguous().T, strided):
        moved = [{**case, "logits": rearranged(case["logits"])} for case in cases]
        assert_matches_reference(gtpo_loss, moved, ["logits"], backend=kernel)


def test_no_gradient_is_allocated_for_a_frozen_weight(kernel: str) -> None:
    case = loss_case(6, 9, 4)
    rows = (*(case[name] for name in ROWS), 1.0, None, 0.0, None, *CLIPPED, False)
    head = tuple(case[name] for name in HEAD)
    outputs = ops.linear_gtpo_loss(*head, *rows, None, False, 0.0, True, False, False, False, kernel)
    assert [x.numel() for x in outputs[2:]] == [24, 0, 0]
    case["hidden"].requires_grad_()
    linear_gtpo_loss(**case, backend=kernel).loss.backward()
    assert case["hidden"].grad is not None
    assert case["hidden"].grad.any()
    assert case["weight"].grad is None
    with torch.no_grad():
        assert not linear_gtpo_loss(**case, backend=kernel).loss.requires_grad


@pytest.mark.parametrize("chunk_rows", [1, 7, 60, 1000])
def test_chunk_size_changes_rounding_only(chunk_rows: int, kernel: str) -> None:
    cases = draws(kernel, loss_case, 60, 37, 11, scalar=True)
    assert_matches_reference(linear_gtpo_loss, cases, HEAD, backend=kernel, chunk_rows=chunk_rows)


def test_laws(kernel: str) -> None:
    @settings(max_examples=examples(kernel, 40))
    @given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 12), vocab=st.integers(1, 20), parts=st.integers(1, 4))
    def laws(seed: int, num_rows: int, vocab: int, parts: int) -> None:
        case = loss_case(num_rows, vocab, 3, seed=seed, dtype=torch.float64)
        rows = ("hidden", *ROWS)

        def run(changes: Case, **options: Any) -> list[Tensor]:
            return loss_and_gradients(linear_gtpo_loss, {**case, **changes}, HEAD, backend=kernel, **options)

        whole = run({})
        # the order of the rows does not matter
        order = permutation(num_rows, seed)
        shuffled = run({name: case[name][order] for name in rows})
        assert_close(shuffled, [whole[0], whole[1][order], *whole[2:]])
        # a constant added to all logits changes nothing
        assert_close(run({"bias": case["bias"] + 5.0}), whole)
        # micro-batches with a common denominator add up to the whole batch
        total = int(case["loss_mask"].sum())
        pieces = [run({name: case[name][part::parts] for name in rows}, num_loss_tokens=total) for part in range(parts)]
        for i in (0, 2, 3):
            torch.testing.assert_close(torch.stack([piece[i] for piece in pieces]).sum(dim=0), whole[i])
        for part, piece in enumerate(pieces):
            torch.testing.assert_close(piece[1], whole[1][part::parts])

    laws()


def turn_credit() -> TurnCredit:
    """Three trajectories, of two, two and no turns: 12 tokens, some of them prompt and tool output."""
    return TurnCredit(
        turn_rewards=torch.tensor([-0.1, 1.0, 0.0, 0.0]),
        cu_turns=torch.tensor([0, 2, 4, 4]),
        group_ids=torch.tensor([3, 3, 1]),
        turn_ids=torch.tensor([-1, 0, 0, -1, 1, 1, -1, 2, -1, 3, 3, 3]),
        gamma=0.8,
    )


def test_turn_credit_is_its_advantages_and_mask(backend: str) -> None:
    credit = turn_credit()
    case = loss_case(12, 9, 4, seed=5)
    del case["loss_mask"]
    by_turn = loss_and_gradients(linear_gtpo_loss, {**case, "advantages": credit}, HEAD, backend=backend)
    per_token = {**case, "advantages": credit.advantages(backend=backend), "loss_mask": credit.turn_ids >= 0}
    assert_equal(by_turn, loss_and_gradients(linear_gtpo_loss, per_token, HEAD, backend=backend))
    # a mask of its own, of a truncated trajectory say, goes before the default
    narrower = {**case, "advantages": credit, "loss_mask": credit.turn_ids >= 2}
    assert linear_gtpo_loss(**narrower, backend=backend).metrics.num_active_tokens == 4


def test_packing_equals_a_loop_over_trajectories_in_any_order(kernel: str) -> None:
    # three trajectories, one of them empty, with a group each, so that credit does not couple them
    case = loss_case(13, 17, 4, seed=6, dtype=torch.float64)
    del case["loss_mask"]
    rows = [torch.arange(0, 5), torch.arange(0), torch.arange(5, 13)]
    rewards = [torch.tensor([0.3, 1.0]), torch.zeros(0), torch.tensor([-0.2, 0.1, 0.7])]
    turn_ids = [torch.tensor([0, 0, -1, 1, 1]), torch.arange(0), torch.tensor([0, 0, -1, 1, 1, -1, 2, 2])]

    def packed(order: list[int]) -> list[Tensor]:
        cu_turns = torch.tensor([0, *(len(rewards[i]) for i in order)]).cumsum(0)
        ids = [torch.where(turn_ids[i] < 0, -1, turn_ids[i] + start) for i, start in zip(order, cu_turns, strict=False)]
        credit = TurnCredit(
            turn_rewards=torch.cat([rewards[i] for i in order]),
            cu_turns=cu_turns,
            group_ids=torch.tensor(order),
            turn_ids=torch.cat(ids),
            gamma=0.9,
        )
        tokens = torch.cat([rows[i] for i in order])
        chosen = {name: case[name][tokens] for name in ("hidden", "targets", "old_logprobs")}
        batch = {**case, **chosen, "advantages": credit}
        return loss_and_gradients(linear_gtpo_loss, batch, HEAD, backend=kernel, num_loss_tokens=10)

    whole = packed([0, 1, 2])
    assert whole[0] != 0
    backwards = packed([2, 1, 0])
    assert_close(backwards, [whole[0], torch.cat([whole[1][5:], whole[1][:5]]), *whole[2:]])
    alone = [packed([i]) for i in range(3)]
    assert_close([sum(one[k] for one in alone) for k in (0, 2, 3)], [whole[k] for k in (0, 2, 3)])
    torch.testing.assert_close(torch.cat([one[1] for one in alone]), whole[1])


def test_a_repeat_is_bitwise_equal(kernel: str) -> None:
    case = loss_case(*fit(kernel, 252, 507, 123))
    assert_equal(*(loss_and_gradients(linear_gtpo_loss, case, HEAD, chunk_rows=64, backend=kernel) for _ in range(2)))
    case = logits_loss_case(*fit(kernel, 252, 507))
    assert_equal(*(loss_and_gradients(gtpo_loss, case, ["logits"], backend=kernel) for _ in range(2)))


def test_gradcheck(backend: str) -> None:
    case = loss_case(6, 7, 3, seed=1, dtype=torch.float64)
    leaves = [case.pop(name).requires_grad_() for name in HEAD]
    options = {"temperature": row_temperature(6), "softcap": 4.0, "backend": backend}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gtpo_loss(hidden, weight, bias=bias, **case, **options).loss

    assert torch.autograd.gradcheck(recomputed(run), leaves, fast_mode=interpreted(backend))
    case = logits_loss_case(5, 4, seed=3, dtype=torch.float64)
    logits = case.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(recomputed(lambda x: gtpo_loss(x, **case, backend=backend).loss), (logits,))


def test_the_upstream_gradient_scales_and_a_second_backward_is_refused(kernel: str) -> None:
    case = loss_case(8, 9, 4)
    plain = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=kernel)
    case["weight"].requires_grad_()
    loss = -0.3 * linear_gtpo_loss(**case, backend=kernel).loss
    loss.backward(retain_graph=True)
    torch.testing.assert_close(case["weight"].grad, -0.3 * plain[2])
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_autocast_does_not_reach_into_the_op(backend: str) -> None:
    case = loss_case(8, 9, 4)
    plain = loss_and_gradients(linear_gtpo_loss, case, HEAD, backend=backend)
    leaves = {name: case[name].clone().requires_grad_() for name in HEAD}
    with torch.autocast(case["hidden"].device.type, dtype=torch.bfloat16):
        loss = linear_gtpo_loss(**{**case, **leaves}, backend=backend).loss
    assert_close([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))], plain)


def test_opcheck(kernel: str) -> None:
    case = loss_case(3, 5, 2)
    targets, advantages, *rest = (case[name] for name in ROWS)
    head = [case[name].clone().requires_grad_() for name in HEAD]
    logits = logits_loss_case(3, 5)["logits"].requires_grad_()
    frozen = (head[0], case["weight"], None, targets, advantages, rest[0], None)
    plain = (1.0, None, 0.0, None, *CLIPPED, False, None, False, 0.0)
    assert_opcheck(ops.linear_gtpo_loss, *frozen, *plain, True, False, False, False, kernel)
    # opcheck's upstream gradient has the sign of the loss: both signs, or a kept gradient scaled by 1 would hide
    for sign in (1, -1):
        rows = (targets, sign * advantages.abs(), *rest)
        warm = (1.0, row_temperature(3), 30.0, torch.tensor(9.0), *CLIPPED, True)
        assert_opcheck(ops.gtpo_loss, logits, *rows, *warm, True, False, kernel)
        cool = (0.7, None, 0.0, None, *CLIPPED, False)
        assert_opcheck(ops.linear_gtpo_loss, *head, *rows, *cool, 2, True, 1e-6, True, True, True, False, kernel)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_whole(frozen: bool, kernel: str) -> None:
    case = loss_case(12, 9, 4)
    del case["loss_mask"], case["advantages"]
    names = HEAD[:1] if frozen else HEAD

    def run(*leaves: Tensor) -> Tensor:
        arguments = {**case, **dict(zip(names, leaves, strict=True)), "advantages": turn_credit()}
        loss, metrics = linear_gtpo_loss(**arguments, softcap=20.0, backend=kernel)
        return 3 * loss + metrics.ratio_mean

    assert_compiles(run, *(case[name] for name in names))


def test_entropy_of_the_metrics_is_that_of_the_per_token_op(backend: str) -> None:
    case = logits_loss_case(12, 11, seed=8)
    active = case["loss_mask"] & (case["advantages"] != 0)
    entropy = token_logprobs(case["logits"], case["targets"], backend=backend).entropy[active].mean()
    torch.testing.assert_close(gtpo_loss(**case, backend=backend).metrics.entropy, entropy)


@cpu_only
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\], got shape \(3,\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V, D\] = \[any, 2\], got shape \(5, 3\)"),
        ({"weight": torch.zeros(0, 2)}, "weight must have a vocabulary of at least 1"),
        ({"bias": torch.zeros(5).long()}, "bias must be float32, float64, bfloat16, float16, got int64"),
        ({"targets": torch.tensor([0, -1, 1])}, r"targets must lie in \[0, 5\), got values from -1 to 1"),
        ({"advantages": torch.zeros(4)}, r"advantages must be \[N\] = \[3\], got shape \(4,\)"),
        ({"advantages": turn_credit()}, r"advantages must be \[N\] = \[3\], got shape \(12,\)"),
        ({"loss_mask": torch.zeros(3)}, "loss_mask must be bool, got float32"),
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs must be \[N\] = \[3\]"),
        ({"temperature": INF}, "temperature must be positive and finite, got inf"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "temperature must be positive and finite in every row"),
        ({"softcap": -30.0}, "softcap must be positive and finite, or None, got -30.0"),
        ({"clip_low": -0.2}, r"clip_low must lie in \[0, 1\], got -0.2"),
        ({"num_loss_tokens": NAN}, "num_loss_tokens must be 0 or more and finite, got nan"),
        ({"num_loss_tokens": torch.tensor(NAN)}, "num_loss_tokens must be 0 or more and finite"),
        ({"metrics": "none"}, "metrics must be one of 'active', 'all', got 'none'"),
        ({"chunk_rows": -1}, "chunk_rows must be at least 1, got -1"),
        ({"filter_eps": -1e-3}, r"filter_eps must lie in \[0, 1\), got -0.001"),
        ({"backend": "fast"}, "backend must be one of 'reference', 'torch', .*, got 'fast'"),
    ],
)
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


def test_bad_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[N, V\], got shape \(1,\)"):
        gtpo_loss(torch.zeros(1), torch.zeros(1).long(), torch.ones(1))
