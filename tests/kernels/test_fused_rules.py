"""The fused losses of every rule, on every backend, held against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo_kernels import LossRule, gtpo_loss, gtpo_loss_, linear_gtpo_loss
from gtpo_kernels.clipped_loss.reference import LossTerms
from gtpo_kernels.testing import assert_matches_reference
from tests.kernels.conftest import (
    HEAD,
    Case,
    assert_close,
    assert_compiles,
    assert_opcheck,
    cpu_only,
    draws,
    fit,
    logits_loss_case,
    loss_and_gradients,
    loss_case,
    single_rows,
)
from tests.kernels.test_gtpo_loss import edge_rows
from tests.kernels.test_loss_rules import EVERYTHING, RULES, with_rows

FAMILY = "gtpo_loss"
ops = torch.ops.gtpo_kernels
# slopes are the same code for all backends, and tested with `clipped_loss`; here each way through the sweeps
each_way = pytest.mark.parametrize("name", ["weights", "k3", "entropy", "shared", "everything"])


def cases_of(make: Callable[..., Case], kernel: str, rows: tuple[str, ...], *shape: int, **options: Any) -> list[Case]:
    return [with_rows(case, rows) for case in draws(kernel, make, *shape, scalar=True, **options)]


@each_way
def test_from_hidden_states(name: str, kernel: str) -> None:
    options, rows = RULES[name]
    cases = cases_of(loss_case, kernel, rows, *fit(kernel, 12, 37, 11), temperature=1.3)
    assert_matches_reference(linear_gtpo_loss, cases, HEAD, backend=kernel, chunk_rows=7, **options)


@each_way
def test_from_logits(name: str, kernel: str) -> None:
    options, rows = RULES[name]
    cases = cases_of(logits_loss_case, kernel, rows, *fit(kernel, 12, 37), softcap=4.0)
    assert_matches_reference(gtpo_loss, cases, ["logits"], backend=kernel, metrics="all", **options)


@each_way
def test_in_place(name: str, kernel: str) -> None:
    options, rows = RULES[name]
    case = with_rows(logits_loss_case(9, 23, dtype=torch.float64), rows)
    loss, d_logits = loss_and_gradients(gtpo_loss, case, ["logits"], backend=kernel, **options)
    overwritten = case["logits"].clone()
    result = gtpo_loss_(**{**case, "logits": overwritten}, backend=kernel, **options)
    assert_close([result.loss, overwritten], [loss, d_logits])


def test_edge_rows(kernel: str) -> None:
    case = with_rows({**edge_rows(), "loss_mask": torch.ones(9, dtype=torch.bool)}, ("ref_logprobs",))
    for one in (case, *single_rows(case)):
        assert_matches_reference(gtpo_loss, [one], ["logits"], backend=kernel, rule=EVERYTHING)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_without_active_rows_all_is_zero(num_rows: int, backend: str) -> None:
    head = loss_case(3, 5, 2)
    case = {name: value if name in ("weight", "bias") else value[:num_rows] for name, value in head.items()}
    case["loss_mask"] = torch.zeros(num_rows, dtype=torch.bool)
    case = with_rows(case, ("ref_logprobs", "token_weights", "ratio_ids"))
    results = loss_and_gradients(linear_gtpo_loss, case, HEAD, rule=EVERYTHING, backend=backend)
    assert not any(value.any() for value in results)


def test_opcheck(kernel: str) -> None:
    case = with_rows(loss_case(3, 5, 2), ("ref_logprobs", "token_weights", "ratio_ids"))
    case["logits"] = logits_loss_case(3, 5)["logits"]
    mask = torch.ones_like(case["loss_mask"])
    case.update(ratio_ids=case["ratio_ids"].abs(), token_weights=case["token_weights"].nan_to_num(0.5))
    case["ref_logprobs"] = case["ref_logprobs"].nan_to_num(-1.0)
    terms = LossTerms(0.2, 0.28, *EVERYTHING, case["ref_logprobs"], case["token_weights"], case["ratio_ids"])
    rows = (case["targets"], case["advantages"], mask, case["old_logprobs"], 0.7, None, 0.0, None)
    head = [case[name].requires_grad_() for name in HEAD]
    assert_opcheck(ops.gtpo_loss, case["logits"].requires_grad_(), *rows, *terms, False, True, False, kernel)
    assert_opcheck(ops.linear_gtpo_loss, *head, *rows, *terms, False, 2, False, 0.0, True, True, True, False, kernel)


def test_compiled_whole(kernel: str) -> None:
    case = with_rows(loss_case(6, 5, 3), ("ref_logprobs", "ratio_ids"))

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        changed = {**case, "hidden": hidden, "weight": weight}
        loss, metrics = linear_gtpo_loss(**changed, rule=EVERYTHING, backend=kernel)
        assert metrics.ref_kl is not None
        return 3 * loss + metrics.ref_kl

    assert_compiles(run, case["hidden"], case["weight"])


@cpu_only
@pytest.mark.parametrize("option", [{"skip_clipped": True}, {"filter_eps": 0.1}])
def test_rows_are_not_left_out_of_a_penalty(option: Case) -> None:
    case = loss_case(3, 5, 2)
    with pytest.raises(ValueError, match="skip_clipped and filter_eps are for losses without a kl or entropy term"):
        linear_gtpo_loss(**case, rule=LossRule(entropy_coef=0.1), **option)
