"""The bias study in small: exact gradients, unbiased credits found unbiased, biased ones found biased, the document."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import bias
from gtpo.methods import PRESETS, describe_credit, describe_loss

PROCESSES = {process.name: process for process in bias.PROCESSES}
DOCUMENT = (Path(__file__).parents[1] / "docs" / "credit.md").read_text()


@pytest.fixture(scope="module")
def findings() -> dict[tuple[str, str], bias.Finding]:
    return {(finding.method, finding.process): finding for finding in bias.study(400)}


def test_objectives_by_hand() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    # half of the trajectories answer at each turn; all that reach the fifth do
    expected = 0.5 * 0.1 + 0.25 * 0.35 + 0.125 * 0.55 + 0.0625 * 0.7 + 0.0625 * 0.8
    assert float(PROCESSES["search"].objective(zero)) == pytest.approx(expected)
    for name in ("luck", "loan"):
        assert float(PROCESSES[name].objective(zero)) == pytest.approx(0.5)
        assert PROCESSES[name].gradient().abs().max() < 1e-15
    # the first turn is worth 0.25 in the easy task, the second 0.35 in the hard one
    two = PROCESSES["two tasks"].gradient()
    assert two.tolist() == pytest.approx([0.5 * 0.25 * 0.25, 0.5 * 0.25 * 0.35])


def test_sampled_trajectories_have_the_expected_return() -> None:
    for process in bias.PROCESSES:
        rollouts = bias.sample(process, 1000, 8, torch.Generator().manual_seed(3))
        total = torch.zeros(8000, dtype=torch.float64)
        total.index_add_(0, torch.arange(8000).repeat_interleave(rollouts.cu_turns.diff()), rollouts.rewards)
        expected = float(process.objective(torch.tensor(process.logits, dtype=torch.float64)))
        assert abs(float(total.mean()) - expected) < 4 * float(total.std()) / math.sqrt(8000)


@pytest.mark.parametrize(("name", "scale"), [("rloo", 1.0), ("turn_rloo", 1.0), ("dr_grpo", 7 / 8)])
def test_what_takes_the_others_mean_off_is_unbiased(
    name: str, scale: float, findings: dict[tuple[str, str], bias.Finding]
) -> None:
    for process in PROCESSES:
        finding = findings[name, process]
        assert not finding.is_biased, finding
        if not math.isnan(finding.scale):
            assert abs(finding.scale / scale - 1) < 4 / (finding.signal * math.sqrt(finding.num_batches))


def test_biases_are_found(findings: dict[tuple[str, str], bias.Finding]) -> None:
    # rewards normalised turn by turn and then summed: whoever goes on is charged the mean of each further turn
    assert findings["igpo by turn", "search"].signal < -0.5
    assert findings["igpo by turn", "luck"].more_turns < -1
    # a discount is a wish for fewer turns
    assert findings["gtpo", "luck"].is_biased and findings["gtpo", "luck"].more_turns < 0
    assert not findings["gtpo, gamma 1", "luck"].is_biased
    # one baseline for all turns pays those who have much still before them
    assert findings["gtpo, gamma 1", "loan"].is_biased and findings["gtpo, gamma 1", "loan"].more_turns > 0
    for finding in findings.values():
        assert math.isfinite(finding.bias) and finding.bias_error > 0


def test_a_plotted_bias_keeps_its_sign(findings: dict[tuple[str, str], bias.Finding]) -> None:
    for process in ("search", "paid calls"):
        angle, error = findings["igpo by turn", process].angle
        assert angle - error > 90
        angle, error = findings["rloo", process].angle
        assert 0 <= angle < 45 and error < 45
    with_gradient = dict.fromkeys(("bias", "signal"), 1.0)
    by_hand = dataclasses.replace(findings["rloo", "search"], **with_gradient, bias_error=0.1)
    assert by_hand.angle == pytest.approx((45.0, math.degrees(0.05)))
    assert dataclasses.replace(by_hand, signal=-1.0).angle[0] == pytest.approx(135.0)
    assert findings["gtpo", "luck"].drift[0] < 0 < findings["gtpo, gamma 1", "loan"].drift[0]


def test_the_document_lists_every_preset_as_it_is() -> None:
    for name, preset in PRESETS.items():
        row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{describe_credit(preset.method)}`" in row and describe_loss(preset.method) in row
        numbers = re.findall(r"\d{4}\.\d{5}", preset.source)
        assert all(number in row for number in numbers)


def test_the_document_has_the_tables_and_the_plot() -> None:
    written = DOCUMENT.split(bias.BEGIN)[1].split(bias.END)[0]
    for name in bias.CREDITS:
        assert f"\n| {name} | " in written
    assert bias.PLOT.stat().st_size < 100_000


def test_a_section_is_written_from_findings(findings: dict[tuple[str, str], bias.Finding], tmp_path: Path) -> None:
    found = list(findings.values())
    text = bias.section(found, found)
    assert text.startswith(bias.BEGIN) and text.endswith(bias.END)
    assert "**against it; " in text
    bias.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
