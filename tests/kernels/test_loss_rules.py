"""Losses other than the clipped surrogate, of log-probabilities: their definition, against loops over the formulas,
and their slopes against the definition.
"""

import math
from typing import Any

import pytest
import torch

from gtpo_kernels import LossRule, clipped_loss, loss_mean, rollout_weights, sequence_ids
from gtpo_kernels.clipped_loss.reference import LossTerms
from gtpo_kernels.testing import assert_matches_reference, recomputed
from tests.kernels.conftest import INF, NAN, Case, assert_opcheck, cpu_only, on_device

FAMILY = "clipped_loss"
EVERYTHING = LossRule("ppo", dual_clip=1.5, kl="k3", kl_coef=0.3, entropy_coef=0.2)
# name: options of the loss, and which of the optional rows it takes
RULES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "weights": ({}, ("token_weights",)),
    "dual": ({"rule": LossRule(dual_clip=1.1), "clip_high": 0.05}, ()),
    "cispo": ({"rule": LossRule("cispo"), "clip_low": 1.0, "clip_high": 0.1}, ("token_weights",)),
    "reinforce": ({"rule": LossRule("reinforce")}, ()),
    "k1": ({"rule": LossRule(kl="k1", kl_coef=0.5)}, ("ref_logprobs",)),
    "k2": ({"rule": LossRule(kl="k2", kl_coef=0.5)}, ("ref_logprobs", "token_weights")),
    "k3": ({"rule": LossRule("reinforce", kl="k3", kl_coef=0.5)}, ("ref_logprobs",)),
    "rho k3": ({"rule": LossRule(kl="rho_k3", kl_coef=0.5)}, ("ref_logprobs", "token_weights")),
    "entropy": ({"rule": LossRule(entropy_coef=0.3)}, ("token_weights",)),
    "shared": ({"clip_low": 0.05, "clip_high": 0.05}, ("ratio_ids", "token_weights")),
    "shared cispo": ({"rule": LossRule("cispo"), "clip_high": 0.02}, ("ratio_ids",)),
    "shared rho k3": ({"rule": LossRule("cispo", kl="rho_k3", kl_coef=0.5)}, ("ref_logprobs", "ratio_ids")),
    "sapo": ({"rule": LossRule("sapo", gate=(0.7, 1.4))}, ("token_weights",)),
    "shared sapo": ({"rule": LossRule("sapo", kl="k2", kl_coef=0.2, gate=(1.0, 1.05))}, ("ratio_ids", "ref_logprobs")),
    "vespo": ({"rule": LossRule("vespo", gate=(2.0, 3.0, 3.0, 2.0))}, ("token_weights",)),
    "shared vespo": ({"rule": LossRule("vespo", gate=(2.0, 3.0, 1.5, 0.5))}, ("ratio_ids", "token_weights")),
    "dppo": ({"rule": LossRule("dppo"), "clip_low": 0.04, "clip_high": 0.06}, ("token_weights",)),
    "ipo": (
        {"rule": LossRule("ipo", kl="k2", kl_coef=0.5), "clip_low": 0.04, "clip_high": 0.06},
        ("ref_logprobs", "token_weights"),
    ),
    "shared ipo": ({"rule": LossRule("ipo"), "clip_low": 0.05, "clip_high": 0.05}, ("ratio_ids",)),
    "everything": ({"rule": EVERYTHING, "clip_low": 0.1}, ("ref_logprobs", "token_weights", "ratio_ids")),
}
every_rule = pytest.mark.parametrize("name", list(RULES))


def with_rows(case: Case, rows: tuple[str, ...]) -> Case:
    """The case and those of the optional rows; what they hold outside the loss mask must have no effect."""
    old_logprobs = case.get("old_logprobs", -2 * torch.ones(len(case["targets"])))
    num_rows, dtype = len(old_logprobs), old_logprobs.dtype
    generator = torch.Generator().manual_seed(num_rows)
    noise, positive = torch.rand(2, num_rows, generator=generator, device="cpu")
    optional = {
        "ref_logprobs": old_logprobs.cpu() + noise - 0.4,
        "token_weights": positive.masked_fill(positive < 0.1, 0.0),
        "ratio_ids": torch.randint(7, (num_rows,), generator=generator, device="cpu") * 1000,
    }
    chosen = on_device({name: optional[name] for name in rows})
    hidden = ~case["loss_mask"]
    for row in chosen.values():
        row.masked_fill_(hidden, NAN if row.is_floating_point() else -1)
    return {**case, **{name: row.to(dtype) if row.is_floating_point() else row for name, row in chosen.items()}}


def token_case(num_tokens: int, rows: tuple[str, ...], *, seed: int = 0) -> Case:
    """Log-probabilities in float64, their entropy, and the rows of a rule."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(4, num_tokens, generator=generator, device="cpu", dtype=torch.float64)
    case: Case = {
        "targets": torch.zeros(num_tokens),
        "logprobs": -3 * uniform[0],
        "entropy": uniform[1],
        "advantages": (2 * uniform[2] - 1).masked_fill(uniform[2] < 0.2, 0.0),
        "loss_mask": uniform[3] < 0.8,
        "old_logprobs": -3 * uniform[0] + 0.6 * (uniform[1] - 0.5),
    }
    case = with_rows(on_device(case), rows)
    del case["targets"]
    return case


def by_hand(case: Case, clip_low: float, clip_high: float, rule: LossRule) -> float:
    """The loss as a loop over tokens, from the formulas of `LossRule`."""
    rows = {name: value.tolist() for name, value in case.items()}
    counted = [i for i, is_in in enumerate(rows["loss_mask"]) if is_in]
    groups: dict[int, list[float]] = {}
    for i in counted:
        key = rows["ratio_ids"][i] if "ratio_ids" in rows else i
        groups.setdefault(key, []).append(rows["logprobs"][i] - rows["old_logprobs"][i])
    total = 0.0
    for i in counted:
        key = rows["ratio_ids"][i] if "ratio_ids" in rows else i
        ratio = math.exp(sum(groups[key]) / len(groups[key]))
        advantage, logprob = rows["advantages"][i], rows["logprobs"][i]
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        if rule.surrogate == "reinforce":
            gain = advantage * logprob
        elif rule.surrogate == "cispo":
            gain = bounded * advantage * logprob
        elif rule.surrogate == "sapo":
            tau = rule.gate[0] if advantage > 0 else rule.gate[1]
            gain = 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
        elif rule.surrogate == "vespo":
            k, decay = rule.gate[:2] if advantage >= 0 else rule.gate[2:]
            product = math.exp(sum(groups[key]))
            gain = product**k * math.exp(decay * (1 - product)) * advantage * logprob
        elif rule.surrogate in ("dppo", "ipo"):
            change = math.exp(logprob) - math.exp(rows["old_logprobs"][i])
            low, high = change < -clip_low, change > clip_high
            if rule.surrogate == "dppo":
                low, high = low and advantage < 0, high and advantage > 0
            gain = 0.0 if low or high else ratio * advantage
        else:
            gain = min(ratio * advantage, bounded * advantage)
            if rule.dual_clip is not None and advantage < 0:
                gain = max(gain, rule.dual_clip * advantage)
        loss = -gain - rule.entropy_coef * rows["entropy"][i]
        if rule.kl != "none":
            x = rows["ref_logprobs"][i] - logprob
            k3 = math.exp(x) - 1 - x
            loss += rule.kl_coef * {"k1": -x, "k2": x * x / 2, "k3": k3, "rho_k3": ratio * k3}[rule.kl]
        total += loss * (rows["token_weights"][i] if "token_weights" in rows else 1.0)
    return total / len(counted)


@every_rule
def test_the_definition_is_the_formula(name: str, backend: str) -> None:
    options, rows = RULES[name]
    for seed in range(5):
        case = token_case(30, rows, seed=seed)
        loss = clipped_loss(**case, backend=backend, **options).loss
        rule = options.get("rule", LossRule())
        expected = by_hand(case, options.get("clip_low", 0.2), options.get("clip_high", 0.28), rule)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@every_rule
def test_slopes_are_those_of_the_loss(name: str, kernel: str) -> None:
    options, rows = RULES[name]
    case = token_case(30, rows)
    names = ["logprobs", "entropy"] if options.get("rule", LossRule()).entropy_coef else ["logprobs"]
    assert_matches_reference(clipped_loss, [case], names, backend=kernel, **options)
    # numerically too, but where the formula holds a ratio or its mean constant
    if options.get("rule", LossRule()).surrogate not in ("cispo", "vespo") and "ratio_ids" not in rows:
        leaves = [case.pop(name).requires_grad_() for name in names]
        loss = recomputed(
            lambda *values: (
                clipped_loss(**dict(zip(names, values, strict=True)), **case, backend=kernel, **options).loss
            )
        )
        if "entropy" not in names:
            case["entropy"] = case["entropy"].detach()
        assert torch.autograd.gradcheck(loss, leaves)


def test_a_bounded_ratio_weights_a_cispo_gradient(backend: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([0.5, 1.5, 9.0], dtype=torch.float64)
    options: Case = {"rule": LossRule("cispo"), "clip_low": 0.2, "clip_high": 1.0, "backend": backend}
    result = clipped_loss(logprobs, torch.ones(3), old_logprobs=logprobs.detach() - ratio.log(), **options)
    result.loss.backward()
    assert logprobs.grad is not None
    assert (-3 * logprobs.grad).tolist() == pytest.approx([0.8, 1.5, 2.0], rel=1e-12)


def test_soft_gates_by_hand(backend: str) -> None:
    """A ratio of 2 or 1/2 and an advantage of 1 or -1; the gates of the authors."""
    log2 = math.log(2.0)
    logprobs = torch.full((4,), -2.0, dtype=torch.float64)
    old = logprobs - log2 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])

    def slopes(rule: LossRule) -> list[float]:
        leaf = logprobs.clone().requires_grad_()
        loss = clipped_loss(leaf, advantages, old_logprobs=old, rule=rule, num_loss_tokens=1, backend=backend).loss
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad.tolist()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [
        -advantage * ratio * 4 * sigmoid(tau * (ratio - 1)) * sigmoid(-tau * (ratio - 1))
        for advantage, ratio, tau in ((1, 2, 1.0), (1, 0.5, 1.0), (-1, 2, 1.05), (-1, 0.5, 1.05))
    ]
    assert slopes(LossRule("sapo", gate=(1.0, 1.05))) == pytest.approx(expected, rel=1e-12)
    # w^k exp(lambda (1 - w)): 4 e^-3, e^1.5 / 4, 8 e^-2, e / 8
    expected = [-4 * math.exp(-3), -math.exp(1.5) / 4, 8 * math.exp(-2), math.e / 8]
    assert slopes(LossRule("vespo", gate=(2.0, 3.0, 3.0, 2.0))) == pytest.approx(expected, rel=1e-12)


def test_vespo_takes_the_product_where_others_take_the_mean(backend: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    result = clipped_loss(
        logprobs,
        torch.ones(2),
        old_logprobs=torch.tensor([-1.1, -1.2], dtype=torch.float64),
        rule=LossRule("vespo", gate=(1.0, 1.0, 1.0, 1.0)),
        ratio_ids=torch.tensor([5, 5]),
        num_loss_tokens=1,
        backend=backend,
    )
    result.loss.backward()
    assert logprobs.grad is not None
    product = math.exp(0.3)
    assert logprobs.grad.tolist() == pytest.approx([-product * math.exp(1 - product)] * 2, rel=1e-12)
    assert result.metrics.ratio_mean.item() == pytest.approx(product)


def test_a_moved_probability_is_cut_by_direction_or_by_distance(backend: str) -> None:
    """Probabilities 0.5 to 0.8, 0.45, 0.1, 0.8; a rare token whose ratio is 9 has hardly moved."""
    new, old = [0.8, 0.45, 0.1, 0.8, 0.009], [0.5, 0.5, 0.5, 0.5, 0.001]
    logprobs = torch.tensor(new, dtype=torch.float64).log()
    options: Case = {
        "old_logprobs": torch.tensor(old, dtype=torch.float64).log(),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "num_loss_tokens": 1,
        "backend": backend,
    }
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    for surrogate, kept, fractions in (("dppo", [0, 1, 0, 1, 1], (0.2, 0.2)), ("ipo", [0, 1, 0, 0, 1], (0.2, 0.4))):
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = clipped_loss(leaf, advantages, rule=LossRule(surrogate), **options)  # type: ignore[arg-type]
        loss.backward()
        gains = [keep * p / q * a for keep, p, q, a in zip(kept, new, old, advantages.tolist(), strict=True)]
        assert leaf.grad is not None
        assert leaf.grad.tolist() == pytest.approx([-gain for gain in gains], rel=1e-12)
        assert loss.item() == pytest.approx(-sum(gains), rel=1e-12)
        assert (metrics.clip_low_fraction.item(), metrics.clip_high_fraction.item()) == pytest.approx(fractions)


def test_metrics_by_hand(backend: str) -> None:
    logprobs = torch.full((3,), -2.0, dtype=torch.float64)
    result = clipped_loss(
        logprobs,
        torch.tensor([-1.0, -1.0, 0.0]),
        old_logprobs=logprobs - math.log(4.0) * torch.tensor([1.0, 0.0, 0.0]),
        ref_logprobs=logprobs + torch.tensor([1.0, 0.0, -1.0]),
        rule=LossRule(dual_clip=3.0, kl="k2", kl_coef=0.5),
        backend=backend,
    )
    metrics = result.metrics
    assert metrics.entropy is None
    assert metrics.clip_dual_fraction is not None
    assert metrics.ref_kl is not None
    assert metrics.clip_dual_fraction.item() == pytest.approx(1 / 3)
    assert metrics.ref_kl.item() == pytest.approx(1 / 3)
    # a token of advantage 0 is charged for its divergence too
    assert (metrics.num_active_tokens, metrics.dropped_tokens) == (3.0, 0.0)
    assert result.loss.item() == pytest.approx((3.0 + 1.0 + 0.5 * (0.5 + 0.5)) / 3)
    plain = clipped_loss(logprobs, torch.ones(3), backend=backend).metrics
    assert plain.clip_dual_fraction is plain.ref_kl is None


def test_infinite_log_probabilities_have_no_loss(backend: str) -> None:
    case = token_case(4, ("ref_logprobs", "token_weights"))
    case["loss_mask"] = torch.ones(4, dtype=torch.bool)
    case = {name: row.nan_to_num(1.0) if row.is_floating_point() else row for name, row in case.items()}
    case["ratio_ids"] = torch.tensor([0, 0, 0, 0])
    for name, row in (("logprobs", 0), ("old_logprobs", 1), ("ref_logprobs", 2)):
        case[name][row] = -INF
    leaf = case["logprobs"].requires_grad_()
    loss, metrics = clipped_loss(**case, rule=EVERYTHING, backend=backend)
    loss.backward()
    assert leaf.grad is not None
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.nonzero().tolist() == [[3]]
    assert metrics.nonfinite_tokens == 3


def test_tokens_of_advantage_0_count_where_they_share_a_ratio(backend: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, metrics = clipped_loss(
        logprobs,
        torch.tensor([1.0, 0.0, 0.0]),
        old_logprobs=torch.tensor([-1.0, -1.5, -1.0]),
        ratio_ids=torch.tensor([4, 4, 9]),
        clip_high=1.0,
        backend=backend,
    )
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-math.exp(0.25) / 3, 0.0, 0.0])
    assert (metrics.num_active_tokens, metrics.dropped_tokens) == (2.0, 1.0)


def test_a_shared_ratio_leaves_each_token_its_own_advantage(backend: str) -> None:
    # the mean of the four advantages is 0: a gradient through the geometric mean would be 0 too
    logprobs = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    log_ratio = torch.tensor([0.2, 0.0, -0.1, 0.1], dtype=torch.float64)
    for ids, ratio in (([0, 0, 0, 0], [math.exp(0.05)] * 4), ([3, 3, 7, 7], [math.exp(0.1)] * 2 + [1.0] * 2)):
        loss = clipped_loss(
            logprobs,
            torch.tensor([1.0, 1.0, -1.0, -1.0]),
            old_logprobs=logprobs.detach() - log_ratio,
            ratio_ids=torch.tensor(ids),
            backend=backend,
        ).loss
        (gradient,) = torch.autograd.grad(loss, logprobs)
        expected = [-advantage * rho / 4 for advantage, rho in zip([1, 1, -1, -1], ratio, strict=True)]
        assert gradient.tolist() == pytest.approx(expected, rel=1e-12)


def test_with_one_advantage_a_sequence_it_is_gspo(backend: str) -> None:
    """The gradient of GSPO as its paper has it, arXiv 2507.18071, equation 5: through the geometric mean."""
    generator = torch.Generator().manual_seed(4)
    old, advantages = (
        -3 * torch.rand(5, 8, generator=generator, dtype=torch.float64),
        torch.randn(5, generator=generator),
    )
    leaf = (old + 0.3 * torch.randn(old.shape, generator=generator)).requires_grad_()
    ratio = (leaf - old).mean(dim=1).exp()
    bounded = ratio.clamp(0.97, 1.04)
    expected = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    cu_seqlens, mask = torch.arange(6) * 8, torch.ones(40, dtype=torch.bool)
    mean = loss_mean("seq-mean-token-mean", mask, cu_seqlens)
    found = clipped_loss(
        leaf.flatten(),
        advantages.double().repeat_interleave(8),
        old_logprobs=old.flatten(),
        ratio_ids=sequence_ids(cu_seqlens, 40),
        token_weights=mean.token_weights,
        num_loss_tokens=mean.num_loss_tokens,
        clip_low=0.03,
        clip_high=0.04,
        backend=backend,
    ).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, leaf)[0], torch.autograd.grad(expected, leaf)[0])


def test_opcheck(kernel: str) -> None:
    case = token_case(3, ("ref_logprobs", "token_weights", "ratio_ids"))
    case["loss_mask"] = torch.ones_like(case["loss_mask"])
    leaves = [case["logprobs"].requires_grad_(), case["entropy"].requires_grad_()]
    optional = (case["ref_logprobs"].nan_to_num(-1.0), case["token_weights"].nan_to_num(0.5), case["ratio_ids"].abs())
    rows = (case["advantages"], case["loss_mask"], case["old_logprobs"], None)
    terms = LossTerms(0.2, 0.28, *EVERYTHING, *optional)
    assert_opcheck(torch.ops.gtpo_kernels.clipped_loss, *leaves, *rows, *terms, False, True, False, kernel)


def test_means_over_tokens_by_hand() -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    cu_seqlens = torch.tensor([0, 3, 4, 5, 6], dtype=torch.int32)
    values = torch.tensor([1.0, 100.0, 2.0, 4.0, 100.0, 8.0])
    # of the four sequences one has no token in the loss
    expected = {
        "token-mean": 15 / 4,
        "seq-mean-token-mean": (1.5 + 4 + 8) / 3,
        "seq-mean-token-sum": 15 / 3,
        "constant": 15 / (3 * 10),
    }
    for aggregation, value in expected.items():
        mean = loss_mean(aggregation, mask, cu_seqlens, constant=10.0 if aggregation == "constant" else None)  # type: ignore[arg-type]
        # of reinforce with log-prob -1 and old values the loss is the advantage
        loss = clipped_loss(
            -torch.ones(6),
            values,
            loss_mask=mask,
            rule=LossRule("reinforce"),
            token_weights=mean.token_weights,
            num_loss_tokens=mean.num_loss_tokens,
        ).loss
        assert loss.item() == pytest.approx(value)


def test_rollout_weights_by_hand() -> None:
    old, rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, 1.0, NAN])
    mask = torch.tensor([True, True, True, False])

    def weights(**options: Any) -> list[float]:
        return rollout_weights(old, rollout, mask, **options).tolist()

    high = math.exp(2.0)
    assert weights(correction="truncated", high=5.0) == pytest.approx([1.0, 5.0, 1 / high, 0.0])
    assert weights(correction="truncated", high=0.3) == pytest.approx([0.3, 0.3, 1 / high, 0.0])
    assert weights(correction="masked", low=0.5, high=5.0) == [1.0, 0.0, 0.0, 0.0]
    ids = torch.tensor([0, 0, 1, 1])
    assert weights(correction="truncated", high=5.0, ratio_ids=ids) == pytest.approx([math.e, math.e, 1 / high, 0.0])


@cpu_only
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rule": LossRule("trpo")}, "surrogate must be one of 'ppo', 'cispo', .*, 'ipo', got 'trpo'"),  # type: ignore[arg-type]
        (
            {"rule": LossRule("sapo")},
            r"gate must be \(tau where A > 0, tau elsewhere\) for .*'sapo', positive, got \(\)",
        ),
        ({"rule": LossRule("sapo", gate=(1.0, 0.0))}, r"gate must be .* positive, got \(1.0, 0.0\)"),
        (
            {"rule": LossRule("vespo", gate=(1.0, 2.0))},
            r"gate must be \(k where A >= 0, lambda there, k elsewhere, lambda",
        ),
        ({"rule": LossRule(gate=(1.0,))}, r"gate must be \(nothing\) for the surrogate 'ppo', positive, got \(1.0,\)"),
        ({"rule": LossRule("ipo", dual_clip=3.0)}, "dual_clip is a bound of the surrogate 'ppo'"),
        ({"rule": LossRule(kl="k4", kl_coef=1.0)}, "kl must be one of .*, got 'k4'"),  # type: ignore[arg-type]
        ({"rule": LossRule(kl="k1")}, "ref_logprobs must be given with a kl term, and only then, got None"),
        ({"ref_logprobs": torch.zeros(3)}, "ref_logprobs must be given with a kl term, and only then, got a tensor"),
        ({"rule": LossRule(dual_clip=1.0)}, "dual_clip must be more than 1 and finite, or None, got 1.0"),
        ({"rule": LossRule("cispo", dual_clip=3.0)}, "dual_clip is a bound of the surrogate 'ppo'"),
        ({"rule": LossRule(entropy_coef=-1.0)}, "entropy_coef must be 0 or more and finite, got -1.0"),
        ({"rule": LossRule(entropy_coef=1.0)}, "entropy must be given with an entropy_coef, got None"),
        ({"token_weights": torch.ones(2)}, r"token_weights must be \[N\] = \[3\], got shape \(2,\)"),
        ({"token_weights": -torch.ones(3)}, "token_weights must be 0 or more and finite in the loss mask"),
        ({"ratio_ids": torch.ones(3)}, "ratio_ids must be int32, int64, got float32"),
        ({"ratio_ids": -torch.ones(3).long()}, "ratio_ids must be 0 or more in the loss mask, got a negative one"),
    ],
)
def test_bad_arguments_are_named(bad: Case, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_loss(torch.zeros(3), torch.ones(3), backend=backend, **bad)


@cpu_only
def test_bad_arguments_of_the_weights_are_named() -> None:
    mask, cu_seqlens = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="constant must be given with 'constant', and only then, got None"):
        loss_mean("constant", mask, cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens must not decrease, from 0 to the 3 tokens"):
        sequence_ids(torch.tensor([0, 2]), 3)
    with pytest.raises(ValueError, match=r"low and high must be 0 <= low <= high < inf, got 2.0 and 1.0"):
        rollout_weights(torch.zeros(3), torch.zeros(3), mask, correction="masked", low=2.0, high=1.0)
