"""Ops in surroundings that are not theirs: another default device, fake tensors, a compiler, strange strides, NaN."""

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gtpo_kernels import (
    ClippedLoss,
    CreditRule,
    CreditTerm,
    LossRule,
    TurnCredit,
    clipped_loss,
    combined_advantages,
    gtpo_loss,
    gtpo_loss_,
    linear_gtpo_loss,
    linear_token_logprobs,
    loss_mean,
    rollout_weights,
    sequence_ids,
    token_logprobs,
    turn_advantages,
    turn_returns,
)
from tests.kernels.conftest import (
    INF,
    NAN,
    Case,
    assert_close,
    assert_equal,
    backends,
    cpu_only,
    interpreted,
    logits_loss_case,
    loss_case,
    row_temperature,
)

FAMILY = "gtpo_loss"
MEANS = ("seq-mean-token-mean", "seq-mean-token-sum", "token-mean")
RULES = {
    "clipped": LossRule(),
    "dual clip": LossRule(dual_clip=3.0),
    "ruled": LossRule("cispo", kl="k3", kl_coef=0.1, entropy_coef=0.01),
    "rho_k3": LossRule(kl="rho_k3", kl_coef=0.1),
}


class Call(NamedTuple):
    """function(**leaves): (outputs, what is differentiated by the leaves, None for nothing)."""

    function: Callable[..., tuple[Any, Tensor | None]]
    leaves: dict[str, Tensor]

    def results(self, transform: Callable[[Any], Any] = lambda function: function) -> list[Tensor]:
        """Outputs and gradients of the transformed function."""
        copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        outputs, value = transform(self.function)(**copies)
        gradients = () if value is None else torch.autograd.grad(value, list(copies.values()))
        return [*tensors(outputs), *gradients]


def calls(backend: str) -> dict[str, Call]:
    """Every public function, with all that it may be given."""
    case = loss_case(6, 9, 4, seed=1)
    case["targets"], ids = case["targets"].int(), torch.tensor([0, 0, 2, 2, 2, 5])
    logits = case["hidden"] @ case["weight"].T + case["bias"]
    rows: Case = {name: case[name] for name in ("targets", "advantages", "loss_mask", "old_logprobs")}
    head: Case = {name: case[name] for name in ("hidden", "weight", "bias")}
    options: Case = {"temperature": row_temperature(6), "softcap": 20.0, "backend": backend}
    ref = case["old_logprobs"] - 0.1
    shared: Case = {"token_weights": torch.linspace(0.5, 1, 6), "ratio_ids": ids}
    all_of_it = {**shared, **options, "rule": RULES["ruled"], "ref_logprobs": ref, "metrics": "all"}
    rewards, cu_turns, groups = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([0, 2, 4]), torch.tensor([3, 3])
    turn_ids = torch.tensor([-1, 0, 1, 2, 3, 3])
    batch = (rewards, cu_turns, groups, turn_ids)
    terms = (
        CreditTerm(CreditRule("outcome"), torch.linspace(0, 1, 4)),
        CreditTerm(CreditRule(scope="group_anchor"), 0.5, torch.tensor([True, False, True, True])),
        CreditTerm(CreditRule(scope="batch", population="tokens"), 2.0, torch.arange(4) > 0, "zero"),
    )
    then, extra = (
        CreditRule("turn_reward", scope="batch"),
        {"outcomes": torch.tensor([1.0, 2.0]), "anchor_ids": groups[[0, 0, 1, 1]]},
    )

    cu_seqlens, correction = torch.tensor([0, 2, 2, 6]), {"correction": "masked", "ratio_ids": ids}

    def backward(function: Callable[..., Any], *leaves: str, **arguments: Any) -> Call:
        def run(**copies: Tensor) -> tuple[Any, Tensor]:
            outputs = function(**{**arguments, **copies})
            if isinstance(outputs, ClippedLoss):
                return outputs, outputs.loss
            return outputs, outputs.logprobs.sum() + outputs.entropy.sum()

        return Call(run, {name: arguments[name] for name in leaves})

    def plain(function: Callable[[], Any]) -> Call:
        return Call(lambda: (function(), None), {})

    found: dict[str, Call] = {
        "token_logprobs": backward(token_logprobs, "logits", logits=logits, targets=rows["targets"], **options),
        "linear_token_logprobs": backward(linear_token_logprobs, *head, **head, targets=rows["targets"], **options),
        "gtpo_loss": backward(gtpo_loss, "logits", logits=logits, **rows, **options, num_loss_tokens=7),
        "gtpo_loss of a rule": backward(gtpo_loss, "logits", logits=logits, **rows, **all_of_it),
        "gtpo_loss of float16": backward(gtpo_loss, "logits", logits=logits.half(), **rows, **options),
        "gtpo_loss of turns": backward(
            gtpo_loss, "logits", logits=logits, targets=rows["targets"], advantages=TurnCredit(*batch), backend=backend
        ),
        "linear_gtpo_loss": backward(linear_gtpo_loss, *head, **head, **rows, **options, filter_eps=1e-7, chunk_rows=2),
        "linear_gtpo_loss of a rule": backward(linear_gtpo_loss, *head, **head, **rows, **all_of_it),
        "gtpo_loss_": plain(lambda: (x := logits.clone(), gtpo_loss_(x, **rows, **options))),
        "gtpo_loss_ of a rule": plain(lambda: (x := logits.clone(), gtpo_loss_(x, **rows, **all_of_it))),
        "loss_mean": plain(lambda: [loss_mean(kind, case["loss_mask"], cu_seqlens) for kind in MEANS]),
        "sequence_ids": plain(lambda: sequence_ids(cu_seqlens, 6)),
        "rollout_weights": plain(lambda: rollout_weights(ref, rows["old_logprobs"], rows["loss_mask"], **correction)),
    }
    if backend in backends("clipped_loss", with_reference=True):
        tokens: Case = {"advantages": rows["advantages"], "loss_mask": rows["loss_mask"], "backend": backend}
        found["clipped_loss"] = backward(clipped_loss, "logprobs", logprobs=ref, entropy=-ref, **tokens)
        ruled: Case = {"rule": RULES["ruled"], "ref_logprobs": ref, **tokens, **shared}
        found["clipped_loss of a rule"] = backward(
            clipped_loss, "logprobs", "entropy", logprobs=ref, entropy=-ref, **ruled
        )
    if backend in backends("turn_advantages", with_reference=True):
        found["turn_returns"] = plain(lambda: turn_returns(rewards, cu_turns, backend=backend))
        found["turn_advantages"] = plain(lambda: turn_advantages(*batch, population="trajectories", backend=backend))
        found["combined_advantages"] = plain(
            lambda: combined_advantages(*batch, terms, then=then, **extra, backend=backend)
        )
    return found


def tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for part in results or () for tensor in tensors(part)] if isinstance(results, tuple | list) else []


@cpu_only
def test_a_default_device_is_not_that_of_the_tensors(backend: str) -> None:
    for name, call in calls(backend).items():
        expected = call.results()
        with torch.device("meta"):
            given = call.results()
        assert {tensor.device.type for tensor in given} == {"cpu"}, name
        assert_equal(given, expected)


@cpu_only
def test_fake_tensors_have_the_form_of_real_ones(backend: str) -> None:
    for name, call in calls(backend).items():
        expected = call.results()
        with FakeTensorMode(allow_non_fake_inputs=True):
            if name.startswith("gtpo_loss_"):
                with pytest.raises(RuntimeError, match="gtpo_loss_ runs eagerly only"):
                    call.results()
                continue
            given = call.results()
        for fake, real in zip(given, expected, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), name


@cpu_only
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("eager", ["reference", "torch", "cpp"])
def test_whole_graphs_are_compiled(eager: str) -> None:
    """What a compiler sees is above the backends: those that are interpreted or emulated here would take minutes."""
    for name, call in calls(eager).items():
        if name.startswith("gtpo_loss_"):
            continue
        torch.compiler.reset()
        compiled = call.results(lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"))
        assert_close(compiled, call.results())


def test_bad_values_are_refused_in_a_compiled_graph() -> None:
    torch.compiler.reset()
    ids = torch.compile(sequence_ids, fullgraph=True, backend="aot_eager")
    assert ids(torch.tensor([0, 3, 4]), 4).tolist() == [0, 0, 0, 1]
    with pytest.raises(RuntimeError, match="cu_seqlens must not decrease, from 0 to the 4 tokens"):
        ids(torch.tensor([0, 5, 4]), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_vocabulary_of_one_with_any_strides(dtype: torch.dtype, backend: str) -> None:
    # contiguous all the same, as the stride of a dimension of size 1 says nothing
    num_rows = 5
    logits = torch.linspace(-1, 1, num_rows).to(dtype).view(1, num_rows).t()
    assert (logits.stride(), logits.is_contiguous()) == ((1, num_rows), True)
    targets, advantages = torch.zeros(num_rows).long(), torch.ones(num_rows)
    leaf = logits.detach().requires_grad_()
    token = token_logprobs(leaf, targets, backend=backend)
    result = gtpo_loss(leaf, targets, advantages, backend=backend)
    (gradient,) = torch.autograd.grad(token.logprobs.sum() + token.entropy.sum() + result.loss, leaf)
    assert (token.logprobs.abs().sum(), token.entropy.abs().sum(), gradient.abs().sum()) == (0, 0, 0)
    torch.testing.assert_close(token.lse, logits[:, 0].to(token.lse.dtype))
    assert result.loss == -1
    for rule in RULES.values():
        x, ref = logits.clone(), None if rule.kl == "none" else torch.zeros(num_rows)
        x = x.as_strided(x.shape, (1, num_rows))
        gtpo_loss_(x, targets, advantages, rule=rule, ref_logprobs=ref, backend=backend)
        assert not x.any()
    head = {"hidden": logits.detach().clone().requires_grad_(), "weight": torch.ones(1, 1, dtype=dtype)}
    assert linear_gtpo_loss(**head, targets=targets, advantages=advantages, backend=backend).loss == -1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_nan_in_the_loss_mask_is_seen(rule: LossRule, backend: str) -> None:
    """Loss, the gradient of its row and the means that it is in are NaN, nothing else is."""
    case = logits_loss_case(9, 13, seed=7)
    case["loss_mask"][:6] = True
    case["advantages"][:6] = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0])
    # clipped at both ends, clamped at both ends, neither; a row without advantage
    case["old_logprobs"][:5] += torch.tensor([-2.0, 2.0, -30.0, 30.0, 0.0])
    if rule.kl != "none":
        case["ref_logprobs"] = case["old_logprobs"] - 0.2
    rows = (0, 2, 5) if interpreted(backend) else range(6)
    for name, row, metrics in itertools.product(("advantages", "old_logprobs", "logits"), rows, ("active", "all")):
        poisoned = {**case, name: case[name].clone()}
        poisoned[name][row] = NAN
        expected, given = (nan_result(poisoned, rule, metrics, which) for which in ("reference", backend))
        for (what, right), ours in zip(expected.items(), given.values(), strict=True):
            message = f"{what} with a NaN in {name} of row {row}, metrics={metrics}"
            torch.testing.assert_close(ours, right, equal_nan=True, msg=lambda text, m=message: f"{m}: {text}")
        is_counted = case["advantages"][row] != 0 or name == "advantages" or rule.kl != "none" or metrics == "all"
        if is_counted and name != "advantages":
            assert given["ratio_max"].isnan()
        d_logits = given["d_logits"]
        assert not d_logits[torch.arange(9) != row].isnan().any()
        if name == "advantages":
            # where the clamp acts the gradient is 0, whatever the advantage is
            assert d_logits[row].isnan().all() == (row not in (2, 3) or rule.surrogate != "ppo")


def nan_result(case: Case, rule: LossRule, metrics: Any, backend: str) -> dict[str, Tensor]:
    leaf = case["logits"].clone().requires_grad_()
    loss, seen = gtpo_loss(**{**case, "logits": leaf}, rule=rule, metrics=metrics, backend=backend)
    (d_logits,) = torch.autograd.grad(loss, leaf)
    named = {name: value for name, value in seen._asdict().items() if value is not None}
    return {"loss": loss.detach(), "d_logits": d_logits, **named}


@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1e28, 1e30, 1e38])
def test_any_temperature_and_infinite_logits(temperature: float, backend: str) -> None:
    case = logits_loss_case(4, 23, seed=2)
    case["logits"][1, ::2], case["targets"][1] = -INF, 1
    case["logits"][2, case["targets"][2]] = -INF
    case["advantages"] += 3.0
    per_row = torch.full((4,), temperature, dtype=torch.float64)
    for given in (temperature, per_row):
        for dtype in (torch.float32, torch.float64):
            values = [
                every_value({**case, "logits": case["logits"].to(to)}, given, which)
                for to, which in ((torch.float64, "reference"), (dtype, backend))
            ]
            for right, ours in zip(*values, strict=True):
                torch.testing.assert_close(ours.double(), right.double(), rtol=1e-4, atol=1e-30)
    if temperature > 1e20:
        # all that is possible is equally likely
        entropy = token_logprobs(case["logits"], case["targets"], temperature=temperature, backend=backend).entropy
        torch.testing.assert_close(entropy.exp(), torch.tensor([23.0, 11.0, 22.0, 23.0]))


def every_value(case: Case, temperature: float | Tensor, backend: str) -> list[Tensor]:
    leaf = case["logits"].detach().clone().requires_grad_()
    token = token_logprobs(leaf, case["targets"], temperature=temperature, backend=backend)
    finite = token.logprobs.masked_fill(token.logprobs.detach() == -INF, 0.0)
    result = gtpo_loss(**{**case, "logits": leaf}, temperature=temperature, backend=backend)
    values = (finite.sum(), token.entropy.sum(), result.loss)
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
    return [*(value.detach() for value in token), result.loss.detach(), *gradients]


@cpu_only
@pytest.mark.parametrize("value", [1e-31, 1e39, 1e300])
def test_a_temperature_out_of_float32_is_refused(value: float, backend: str) -> None:
    rows = {"logits": torch.zeros(1, 2), "targets": torch.tensor([0]), "backend": backend}
    with pytest.raises(ValueError, match=re.escape(f"temperature must lie in [1e-30, 1e+38], got {value}")):
        token_logprobs(**rows, temperature=value)
    with pytest.raises(ValueError, match="temperature must be positive and finite in every row, in "):
        token_logprobs(**rows, temperature=torch.tensor([value], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"softcap must lie in \[1e-30, 1e\+30\], or be None"):
        token_logprobs(**rows, softcap=value)
