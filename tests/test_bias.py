"""The bias study in small: exact gradients, unbiased methods found unbiased, biased ones found biased, the document."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import bias, bias_report
from benchmarks.bias_findings import CREDITS, RESULTS, TURN_PROCESSES, Finding, Results
from benchmarks.bias_processes import ENDS, PROCESSES, Process, Rollouts, sample
from gtpo.methods import METHODS, PRESETS, PolicyLoss, describe_credit, describe_loss

NAMED = {process.name: process for process in PROCESSES}
DOCUMENT = bias_report.DOCUMENT.read_text()
Findings = dict[tuple[str, str], Finding]


def by_name(findings: list[Finding]) -> Findings:
    return {(finding.method, finding.process): finding for finding in findings}


@pytest.fixture(scope="module")
def credits() -> Findings:
    return by_name(bias.study(240, CREDITS, processes=TURN_PROCESSES))


@pytest.fixture(scope="module")
def presets() -> Findings:
    return by_name(bias.study(160, METHODS, seed=1))


@pytest.fixture(scope="module")
def kept() -> Results:
    return Results.from_json(RESULTS.read_text())


def rollouts_of(process: Process, num_groups: int, seed: int = 3) -> Rollouts:
    return sample(process, num_groups, 8, torch.Generator().manual_seed(seed))


def test_objectives_by_hand() -> None:
    zero = torch.zeros(6, dtype=torch.float64)
    # half of the trajectories answer at each turn; all that reach the fifth do
    expected = 0.5 * 0.1 + 0.25 * 0.35 + 0.125 * 0.55 + 0.0625 * 0.7 + 0.0625 * 0.8
    assert float(NAMED["search"].objective(zero)) == pytest.approx(expected)
    for name in ("luck", "loan", "padding"):
        assert float(NAMED[name].objective(zero)) == pytest.approx(0.5)
        assert NAMED[name].gradient().abs().max() < 1e-15
    # the first turn is worth 0.25 in the easy task, the second 0.35 in the hard one
    two = NAMED["two tasks"].gradient()
    assert two.tolist() == pytest.approx([0.5 * 0.25 * 0.25, 0.5 * 0.25 * 0.35])
    # lengths 1, 2, 3 with 1/2, 1/4, 1/4 each: 0.75 tokens beyond the first
    assert float(NAMED["writing"].objective(zero)) == pytest.approx(0.35 + 0.75 * 0.25 - 0.75 * 0.15)
    # void, or an answer of 1, 2 or 3 tokens; at the limit half of the answers are cut off
    expected = 0.5 * (0.5 * 0.3 + 0.25 * 0.5 + 0.125 * 0.7 + 0.125 * 0.5)
    assert float(NAMED["limits"].objective(zero)) == pytest.approx(expected)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_sampled_trajectories_have_the_expected_return(process: Process) -> None:
    rollouts = rollouts_of(process, 1000)
    total = torch.zeros(8000, dtype=torch.float64)
    total.index_add_(0, torch.arange(8000).repeat_interleave(rollouts.cu_turns.diff()), rollouts.rewards)
    expected = float(process.objective(torch.tensor(process.sampled or process.logits, dtype=torch.float64)))
    assert abs(float(total.mean()) - expected) < 4 * float(total.std()) / math.sqrt(8000)


def test_tokens_turns_and_trajectories_fit_together() -> None:
    rollouts = rollouts_of(NAMED["limits"], 50)
    for i in range(400):
        tokens = slice(*rollouts.cu_tokens[i : i + 2].tolist())
        turns = slice(*rollouts.cu_turns[i : i + 2].tolist())
        states, end = rollouts.states[tokens].tolist(), ENDS[rollouts.ends[i]]
        # state 0 is a turn of its own, those of the answer are one
        assert (rollouts.turn_ids[tokens] - turns.start).tolist() == [int(state > 0) for state in states]
        assert rollouts.anchors[turns].tolist() == states[:2]
        assert (end == "void") == (len(states) == 1)
        assert end != "truncated" or (len(states) == 4 and rollouts.tokens[tokens].tolist() == [1] * 4)
        assert rollouts.outcomes[i] == rollouts.rewards[turns][-1]
    assert set(rollouts.ends.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_the_estimator_that_all_are_held_against_is_unbiased(process: Process) -> None:
    found = bias.exact_updates(process, rollouts_of(process, 2000), 4)
    error = found.mean(dim=0) - process.gradient()
    assert (error.abs() <= 4 * found.std(dim=0) / math.sqrt(len(found))).all()


def token_weights_by_loops(loss: PolicyLoss, ends: list[str], lengths: list[int]) -> list[float]:
    masked = {"truncated": loss.mask_truncated, "void": loss.mask_void_turns, "answer": False}
    counts = [0 if masked[end] else length for end, length in zip(ends, lengths, strict=True)]
    in_loss = sum(count > 0 for count in counts)
    weights = {
        "token-mean": [1 / sum(counts)] * len(counts),
        "seq-mean-token-mean": [1 / in_loss / max(count, 1) for count in counts],
        "seq-mean-token-sum": [1 / in_loss] * len(counts),
        "constant": [1 / in_loss] * len(counts),
    }[loss.aggregation]
    pairs = zip(weights, counts, lengths, strict=True)
    return [weight * (count > 0) for weight, count, length in pairs for _ in range(length)]


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_credit_times_score_in_the_mean_of_the_preset(name: str) -> None:
    """On-policy, where ratios are 1 and a KL term has no gradient."""
    process, method = NAMED["limits"], METHODS[name]
    rollouts = rollouts_of(process, 6)
    found = bias.updates(process, method, rollouts, 2)
    credit = bias.advantages(method.credit, rollouts, 2)
    logit = torch.tensor(process.logits, dtype=torch.float64)
    chance = torch.sigmoid(logit)
    # d entropy / d logit = -logit p (1 - p)
    entropy = -method.loss.entropy_coef * logit * chance * (1 - chance)
    for batch in range(3):
        trajectories = range(16 * batch, 16 * batch + 16)
        lengths = [int(rollouts.cu_tokens[i + 1] - rollouts.cu_tokens[i]) for i in trajectories]
        weights = token_weights_by_loops(method.loss, [ENDS[rollouts.ends[i]] for i in trajectories], lengths)
        expected = torch.zeros(4, dtype=torch.float64)
        for i, weight in enumerate(weights, int(rollouts.cu_tokens[16 * batch])):
            at = process.observations[int(rollouts.states[i])]
            expected[at] += weight * (credit[i] * (rollouts.tokens[i] - chance[at]) + entropy[at])
        torch.testing.assert_close(found[batch], expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("name", "bounds"), [("gtpo", (0.8, 1.28)), ("mt_grpo", (0.8, 1.2)), ("cispo", (0.0, 5.0))])
def test_late_updates_go_through_ratio_and_clip(name: str, bounds: tuple[float, float]) -> None:
    process = NAMED["late"]
    rollouts = rollouts_of(process, 4)
    credit = bias.advantages(METHODS[name].credit, rollouts, 4)
    logit = torch.tensor(process.logits, dtype=torch.float64)[rollouts.states].requires_grad_()
    logprobs = bias.log_chance(logit, rollouts.tokens)
    ratio = (logprobs - bias.sampled_logprobs(process, rollouts)).exp()
    assert 0.6 < float(ratio.detach().min()) < 0.7 and 1.5 < float(ratio.detach().max()) < 1.7
    gain = torch.minimum(ratio * credit, ratio.clamp(*bounds) * credit)
    if name == "cispo":
        gain = ratio.detach().clamp(*bounds) * credit * logprobs
    expected = bias.sum_by_batch(process, rollouts, torch.autograd.grad(gain.sum(), logit)[0] / len(gain), 4)
    torch.testing.assert_close(bias.updates(process, METHODS[name], rollouts, 4), expected)


@pytest.mark.parametrize(("name", "size"), [("rloo", 1.0), ("turn_rloo", 1.0), ("dr_grpo", 7 / 8)])
def test_what_takes_the_others_mean_off_is_unbiased(name: str, size: float, credits: Findings) -> None:
    for process in TURN_PROCESSES:
        finding = credits[name, process.name]
        assert not finding.is_biased, finding
        if finding.size is not None and finding.size_error is not None:
            assert abs(finding.size - size) < 2 * finding.size_error


def test_rloo_is_the_exact_estimator_where_ratios_are_1(presets: Findings) -> None:
    for process in PROCESSES:
        finding = presets["rloo", process.name]
        assert finding.is_biased == (process.name == "late")
        if finding.variance is not None and not finding.is_biased:
            assert (finding.variance, finding.variance_error) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_biases_of_credits_are_found(credits: Findings) -> None:
    # rewards normalised turn by turn and then summed: whoever goes on is charged the mean of each further turn
    signal = credits["igpo by turn", "search"].signal
    assert signal is not None and signal < -0.5
    assert credits["igpo by turn", "luck"].drift < -1
    # a discount is a wish for fewer turns
    assert credits["gtpo", "luck"].is_biased and credits["gtpo", "luck"].drift < 0
    assert not credits["gtpo, gamma 1", "luck"].is_biased
    # one baseline for all turns pays those who have much still before them
    assert credits["gtpo, gamma 1", "loan"].is_biased and credits["gtpo, gamma 1", "loan"].drift > 0
    # turns without a call count 0 beside those with one, or nothing would say that calls are paid
    assert credits["mt_grpo", "paid calls"].is_found and credits["mt_grpo", "paid calls"].drift > 0
    assert not credits["mt_grpo, among calls", "paid calls"].is_found
    for finding in credits.values():
        assert math.isfinite(finding.bias) and finding.bias_error > 0


def test_biases_of_losses_are_found(presets: Findings) -> None:
    # a mean over each sequence spares long failures: failing, it writes on
    for name in ("deepseek_grpo", "gspo", "matchtir", "simpletir"):
        assert presets[name, "padding"].is_biased and presets[name, "padding"].drift > 0
    for name in ("grpo", "dr_grpo", "dapo", "rloo", "turn_rloo", "cispo"):
        assert not presets[name, "padding"].is_biased
    # a failure that is masked is not unlearned
    assert presets["simpletir", "limits"].cosine[2] < presets["deepseek_grpo", "limits"].cosine[1]
    assert presets["dapo", "limits"].is_biased and not presets["grpo", "limits"].is_biased
    # clips cut what moved furthest, cispo keeps it
    assert presets["cispo", "late"].cosine[1] > presets["grpo", "late"].cosine[2] > presets["gspo", "late"].cosine[2]


def test_a_plotted_bias_keeps_its_sign(credits: Findings) -> None:
    for process in ("search", "paid calls"):
        angle, error = credits["igpo by turn", process].angle
        assert angle - error > 90
        angle, error = credits["rloo", process].angle
        assert 0 <= angle < 45 and error < 45
    by_hand = dataclasses.replace(credits["rloo", "search"], bias=1.0, signal=1.0, bias_error=0.1)
    assert by_hand.angle == pytest.approx((45.0, math.degrees(0.05)))
    assert by_hand.cosine == pytest.approx([math.cos(math.pi / 4 + x) for x in (0, 0.05, -0.05)])
    assert dataclasses.replace(by_hand, signal=-1.0).angle[0] == pytest.approx(135.0)
    assert credits["gtpo", "luck"].signed_bias[0] < 0 < credits["gtpo, gamma 1", "loan"].signed_bias[0]


def test_a_relative_variance_counts_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = 1.0 + torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    noisy = 0.5 + torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    value, error = bias.relative_variance(noisy[:, 0], noisy, exact[:, 0], exact)
    assert abs(value - 4.0) < 1.5 * error < 1.5


def test_kept_results_are_those_of_a_small_study(kept: Results, presets: Findings, credits: Findings) -> None:
    of_presets, of_credits = by_name(kept.presets), by_name(kept.credits)
    assert of_presets.keys() == presets.keys() and of_credits.keys() == credits.keys()
    for name, known in of_presets.items():
        small = presets[name]
        if known.size is not None and small.size is not None:
            errors = math.hypot(known.size_error or 0.0, small.size_error or 0.0) / 1.96
            assert abs(known.size - small.size) < 5 * errors, name
        else:
            assert abs(known.bias - small.bias) < 5 * math.hypot(known.bias_error, small.bias_error) / 1.96, name
    for name, known in of_credits.items():
        small = credits[name]
        if known.size is not None and small.size is not None:
            errors = math.hypot(known.size_error or 0.0, small.size_error or 0.0) / 1.96
            assert abs(known.size - small.size) < 5 * errors, name


def test_the_document_has_what_make_bias_found(kept: Results) -> None:
    written = DOCUMENT[DOCUMENT.index(bias_report.BEGIN) : DOCUMENT.index(bias_report.END)]
    assert written + bias_report.END == bias_report.section(kept)
    for plot in (bias_report.PRESETS_PLOT, bias_report.SIZES_PLOT):
        assert f"({plot.name})" in written and plot.stat().st_size < 150_000


def test_what_the_document_says_of_the_tables_is_in_them(kept: Results) -> None:
    presets, credits = by_name(kept.presets), by_name(kept.credits)
    on_policy = [process.name for process in PROCESSES if process.has_gradient and process.name != "late"]

    def variance(findings: Findings, name: str, process: str) -> float:
        found = findings[name, process].variance
        assert found is not None
        return found

    unbiased = {name.strip("`") for name in bias_report.unbiased(kept.presets)}
    assert unbiased == {"rloo", "turn_rloo", "dr_grpo"}
    for name in ("deepseek_grpo", "gspo", "sapo"):
        assert all(7 < presets[name, process].angle[0] < 20 for process in on_policy if process != "two tasks")
        assert max(variance(presets, name, process) for process in ("search", "limits")) < 0.7
    assert 0.04 < presets["grpo", "padding"].bias / presets["deepseek_grpo", "padding"].bias < 0.07
    assert variance(credits, "gtpo, gamma 1", "paid calls") == pytest.approx(5 / 6, abs=0.03)
    assert variance(credits, "gtpo", "search") == pytest.approx(2, abs=0.2)
    assert variance(credits, "gtpo", "paid calls") == pytest.approx(3.3, abs=0.3)
    assert max(variance(presets, "turn_rloo", process) for process in on_policy) < 1.1
    pooled = [f for f in kept.credits_by_size if (f.method, f.process) == ("gtpo, gamma 1", "search")]
    assert sorted((f.angle[0] for f in pooled), reverse=True) == [f.angle[0] for f in pooled] and pooled[0].angle[0] < 7
    assert presets["igpo", "paid calls"].cosine[2] < 0
    assert presets["mt_grpo", "paid calls"].angle[0] == pytest.approx(11, abs=0.5)
    assert variance(presets, "mt_grpo", "paid calls") == pytest.approx(4.7, abs=0.3)
    assert 7 < credits["mt_grpo, among calls", "loan"].bias / credits["mt_grpo", "loan"].bias < 8
    assert sorted(METHODS, key=lambda name: -presets[name, "late"].cosine[0])[:2] == ["cispo", "dppo"]
    assert all(presets["kevin", process].cosine[2] < 0 for process in ("search", "paid calls"))
    angles = [presets[name, "search"].angle[0] for name in ("gtpo_batch", "gtpo", "hgpo")]
    assert angles == pytest.approx([6, 9, 14], abs=0.5)
    assert not presets["gtpo_batch", "two tasks"].is_biased
    assert presets["maxrl", "two tasks"].angle[0] == pytest.approx(17, abs=0.5)
    others = [process for process in on_policy if process != "two tasks"]
    assert not any(presets["maxrl", process].is_biased for process in others)
    assert 1.4 < max(variance(presets, "maxrl", process) for process in on_policy) < 1.5
    assert variance(presets, "gdpo", "paid calls") == pytest.approx(0.5, abs=0.02)
    assert presets["gdpo", "paid calls"].angle[0] == pytest.approx(7, abs=0.5)
    assert presets["gdpo", "loan"].bias == pytest.approx(1.7, abs=0.05)
    size = presets["gspo", "late"].size
    assert size is not None and abs(size) < 0.1


def test_the_document_lists_every_preset_as_it_is() -> None:
    for name, preset in PRESETS.items():
        row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{describe_credit(preset.method.credit)}`" in row and describe_loss(preset.method.loss) in row
        numbers = re.findall(r"\d{4}\.\d{5}", preset.source)
        assert all(number in row for number in numbers)


def test_a_section_is_written_from_findings(presets: Findings, credits: Findings, tmp_path: Path) -> None:
    results = Results(list(presets.values()), list(credits.values()), list(credits.values()))
    assert Results.from_json(results.as_json()) == results
    text = bias_report.section(results)
    assert text.startswith(bias_report.BEGIN) and text.endswith(bias_report.END)
    assert "| none of it |" in text and "`rloo`" in text
    bias_report.plot_presets(results.presets, tmp_path / "presets.png")
    bias_report.plot_sizes(results.credits_by_size, tmp_path / "sizes.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 1000
