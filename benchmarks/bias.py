"""`make bias`: the policy gradient that each method's credit expects, on small decision processes with a known one.

A policy of one logit an observation acts in a process of a few states; a turn is one action. From many batches of
groups comes the expected update of a method and its noise, beside the gradient of the expected sum of rewards. Does the
expected update point along the gradient, and does it vanish where that does? Tables and plot go into docs/credit.md.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtpo.credit import method_advantages
from gtpo.methods import METHODS, Method, describe_credit

DOCUMENT = Path(__file__).parents[1] / "docs" / "credit.md"
PLOT = DOCUMENT.with_name("credit_bias.png")
RESULTS = Path(__file__).parent / "results" / "bias.json"
BEGIN, END = "<!-- written by make bias -->", "<!-- end of what make bias writes -->"
GROUPS_A_BATCH, GROUP_SIZE = 4, 8
GROUP_SIZES = (4, 8, 16, 32)
# one in a thousand, so that a table of sixty lines has seldom a wrong verdict
QUANTILE_Z = 3.090


@dataclass(frozen=True)
class Branch:
    """What an action may lead to. state: the next one, None where the trajectory ends and the reward is its outcome."""

    probability: float
    reward: float
    state: int | None


@dataclass(frozen=True)
class Process:
    """A decision process with two actions. branches: [state][action]. logits: of action 1, by observation.

    start: probability of each state to be a group's first, drawn once a group: its task.
    """

    name: str
    meaning: str
    branches: Sequence[tuple[Sequence[Branch], Sequence[Branch]]]
    observations: Sequence[int]
    logits: Sequence[float]
    start: Sequence[float]

    def objective(self, logits: Tensor) -> Tensor:
        """Expected sum of rewards, differentiable; a state leads to later ones only."""
        values: dict[int | None, Tensor] = {None: logits.new_zeros(())}
        for state in reversed(range(len(self.branches))):
            chance = torch.sigmoid(logits[self.observations[state]])
            of_action = [
                torch.stack([b.probability * (b.reward + values[b.state]) for b in branches]).sum()
                for branches in self.branches[state]
            ]
            values[state] = (1 - chance) * of_action[0] + chance * of_action[1]
        return torch.stack([p * values[state] for state, p in enumerate(self.start)]).sum()

    def gradient(self) -> Tensor:
        """[D] float64, exact."""
        logits = torch.tensor(self.logits, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.objective(logits), logits)[0]


def ends(chance: float, reward: float = 1.0, shift: float = 0.0) -> list[Branch]:
    """The end, with `reward` in so many cases, and `shift` in all."""
    return [Branch(chance, reward + shift, None), Branch(1.0 - chance, shift, None)]


def call_or_answer(name: str, meaning: str, chances: Sequence[float], pay: Sequence[Branch], refund: float) -> Process:
    """Action 1 calls once more and is paid for it, action 0 answers, right with a chance that depends on the turn."""
    branches: list[tuple[Sequence[Branch], Sequence[Branch]]] = []
    for turn, chance in enumerate(chances):
        answer = ends(chance, shift=-refund * turn)
        more = [dataclasses.replace(branch, state=turn + 1) for branch in pay]
        branches.append((answer, more if turn + 1 < len(chances) else answer))
    start = [1.0] + [0.0] * (len(chances) - 1)
    return Process(name, meaning, branches, range(len(chances)), [0.4] * len(chances), start)


def two_tasks() -> Process:
    """An easy and a hard task, two turns each. In the one the first turn matters, in the other the second."""
    branches: list[tuple[Sequence[Branch], Sequence[Branch]]] = [
        ([Branch(1.0, 0.0, 2)], [Branch(1.0, 0.0, 3)]),  # easy, first turn
        ([Branch(1.0, 0.0, 4)], [Branch(1.0, 0.0, 4)]),  # hard, first turn
        (ends(0.70), ends(0.70)),  # easy, first action 0
        (ends(0.95), ends(0.95)),  # easy, first action 1
        (ends(0.20), ends(0.55)),  # hard
    ]
    meaning = "an easy task, in which the first turn matters, and a hard one, in which the second does"
    return Process("two tasks", meaning, branches, [0, 0, 1, 1, 1], [0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0])


FREE = [Branch(1.0, 0.0, 0)]
PROCESSES = [
    call_or_answer("search", "each call makes the answer likelier to be right", [0.1, 0.35, 0.55, 0.7, 0.8], FREE, 0.0),
    two_tasks(),
    call_or_answer(
        "paid calls",
        "calls are paid 0.3 or -0.1, and change nothing else",
        [0.5] * 5,
        [Branch(0.5, 0.3, 0), Branch(0.5, -0.1, 0)],
        0.0,
    ),
    call_or_answer("luck", "answers are right by chance, whatever was done: no gradient", [0.5] * 5, FREE, 0.0),
    call_or_answer(
        "loan",
        "a call is paid 0.2, which the answer gives back: no gradient",
        [0.5] * 5,
        [Branch(1.0, 0.2, 0)],
        0.2,
    ),
]
CREDITS: dict[str, Method] = {
    **{
        name: METHODS[name]
        for name in (
            "gtpo",
            "grpo",
            "dr_grpo",
            "rloo",
            "turn_rloo",
            "reinforce_pp",
            "mt_grpo",
            "matchtir",
            "gigpo",
            "igpo",
        )
    },
    "gtpo, gamma 1": dataclasses.replace(METHODS["gtpo"], gamma=1.0),
    "igpo by turn": dataclasses.replace(METHODS["igpo"], scope="group_turn"),
}
BY_SIZE = ("gtpo", "gtpo, gamma 1", "grpo", "rloo", "turn_rloo", "igpo", "igpo by turn")


@dataclass(frozen=True)
class Rollouts:
    """Trajectories of `num_groups` groups in a row. Flat over turns [K]: rewards, states, actions; cu_turns [B+1]."""

    rewards: Tensor
    states: Tensor
    actions: Tensor
    cu_turns: Tensor
    outcomes: Tensor
    num_groups: int

    @property
    def group_of_turn(self) -> Tensor:
        size = len(self.outcomes) // self.num_groups
        return (torch.arange(len(self.outcomes)) // size).repeat_interleave(self.cu_turns.diff())


def sample(process: Process, num_groups: int, group_size: int, generator: torch.Generator) -> Rollouts:
    """Plays all trajectories at once, a turn after the other."""
    most = max(len(branches) for pair in process.branches for branches in pair)
    shape = (len(process.branches), 2, most)
    chance, reward = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    following = torch.full(shape, -1)
    for state, pair in enumerate(process.branches):
        for action, branches in enumerate(pair):
            for number, branch in enumerate(branches):
                chance[state, action, number], reward[state, action, number] = branch.probability, branch.reward
                following[state, action, number] = -1 if branch.state is None else branch.state
    act = torch.sigmoid(torch.tensor(process.logits))[torch.tensor(process.observations)]
    start = torch.multinomial(torch.tensor(process.start), num_groups, replacement=True, generator=generator)
    state = start.repeat_interleave(group_size)
    turns = []
    while (state >= 0).any():
        alive = state >= 0
        at = state.clamp(min=0)
        action = (torch.rand(len(state), generator=generator) < act[at]).long()
        branch = torch.multinomial(chance[at, action], 1, generator=generator).squeeze(1)
        turns.append((alive, at, action, reward[at, action, branch]))
        state = torch.where(alive, following[at, action, branch], -1)
    alive, states, actions, rewards = (torch.stack(part, dim=1) for part in zip(*turns, strict=True))
    lengths = alive.sum(dim=1)
    outcomes = rewards.gather(1, lengths[:, None] - 1).squeeze(1)
    cu_turns = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Rollouts(rewards[alive], states[alive], actions[alive], cu_turns, outcomes, num_groups)


def updates(process: Process, method: Method, rollouts: Rollouts, groups_a_batch: int) -> Tensor:
    """[number of batches, D]: the update that each batch asks for, a mean over its trajectories."""
    num_batches = rollouts.num_groups // groups_a_batch
    num_turns, group_of_turn = len(rollouts.rewards), rollouts.group_of_turn
    last = torch.zeros(num_turns, dtype=torch.bool)
    last[rollouts.cu_turns[1:] - 1] = True
    group_of_trajectory = group_of_turn[rollouts.cu_turns[:-1]]

    def credit(trajectories: slice) -> Tensor:
        bounds = rollouts.cu_turns[trajectories.start : trajectories.stop + 1]
        turns = slice(int(bounds[0]), int(bounds[-1]))
        return method_advantages(
            method,
            rollouts.rewards[turns],
            bounds - bounds[0],
            group_of_trajectory[trajectories],
            torch.arange(turns.stop - turns.start),
            outcomes=rollouts.outcomes[trajectories],
            anchor_ids=rollouts.states[turns],
            turns_with_calls=~last[turns],
        ).turn_advantages

    num_trajectories = len(rollouts.outcomes)
    each = num_trajectories // num_batches
    # statistics of groups do not see other batches, so one call serves all
    if method.whiten or method.scope == "batch":
        advantages = torch.cat([credit(slice(i, i + each)) for i in range(0, num_trajectories, each)])
    else:
        advantages = credit(slice(0, num_trajectories))
    observation = torch.tensor(process.observations)[rollouts.states]
    chance = torch.sigmoid(torch.tensor(process.logits, dtype=torch.float64))[observation]
    score = advantages * (rollouts.actions - chance)
    size = len(process.logits)
    total = torch.zeros(num_batches * size, dtype=torch.float64)
    total.index_add_(0, group_of_turn // groups_a_batch * size + observation, score)
    return total.view(num_batches, size) / each


@dataclass(frozen=True)
class Finding:
    """Of one method on one process.

    bias: the part of the expected update that does not point along the gradient, in parts of the one that does; where
    there is no gradient, the whole expected update in standard deviations of one batch's. bias_error: half its 95 %
    interval. is_biased: it is not 0, or points against the gradient. signal: the part along the gradient, in those
    standard deviations. scale: expected update over gradient. more_turns: the expected change of all logits together,
    in those standard deviations.
    """

    process: str
    method: str
    group_size: int
    bias: float
    bias_error: float
    is_biased: bool
    signal: float
    scale: float
    more_turns: float
    num_batches: int

    @property
    def angle(self) -> tuple[float, float]:
        """Between expected update and gradient, in degrees, and half its interval; above 90 it points against it."""
        along = math.copysign(1.0, self.signal)
        return math.degrees(math.atan2(self.bias, along)), math.degrees(self.bias_error / (1.0 + self.bias**2))

    @property
    def drift(self) -> tuple[float, float]:
        """Where there is no gradient: the expected update in deviations, below 0 for fewer turns; half its interval."""
        return math.copysign(self.bias, self.more_turns), self.bias_error


def judge(process: Process, name: str, batches: Tensor, group_size: int) -> Finding:
    """batches: [n, D] from `updates`. Biased: a test at one in a thousand rejects that it is not."""
    count, size = batches.shape
    gradient = process.gradient()
    has_gradient = bool(gradient.norm() > 1e-9)
    mean, covariance = batches.mean(dim=0), torch.cov(batches.T).reshape(size, size)
    # takes the part along the gradient out; nothing, where there is none
    unit = gradient / gradient.norm() if has_gradient else torch.zeros_like(gradient)
    across = torch.eye(size, dtype=torch.float64) - torch.outer(unit, unit)
    off, spread = across @ mean, across @ covariance @ across
    degrees = size - int(has_gradient)
    statistic = float(count * off @ torch.linalg.pinv(spread, rtol=1e-9) @ off)
    # Wilson and Hilferty's approximation of the quantile of chi-squared
    quantile = degrees * (1 - 2 / (9 * degrees) + QUANTILE_Z * math.sqrt(2 / (9 * degrees))) ** 3
    noise = float(covariance.trace().sqrt())
    along = float(unit @ mean)
    unit_of_bias = abs(along) if has_gradient else noise
    # the square of a mean's length is too long by its variance
    length = math.sqrt(max(float(off @ off - spread.trace() / count), 0.0))
    error = 1.96 * math.sqrt(float(spread.trace()) / count)
    return Finding(
        process=process.name,
        method=name,
        group_size=group_size,
        bias=length / unit_of_bias,
        bias_error=error / unit_of_bias,
        is_biased=statistic > quantile or along < -QUANTILE_Z * noise / math.sqrt(count),
        signal=along / noise,
        scale=along / float(gradient.norm()) if has_gradient else math.nan,
        more_turns=float(mean.sum()) / noise,
        num_batches=count,
    )


def study(num_batches: int, *, group_size: int = GROUP_SIZE, methods: Sequence[str] = tuple(CREDITS)) -> list[Finding]:
    """Every method on every process; all methods see the same trajectories."""
    findings = []
    for number, process in enumerate(PROCESSES):
        generator = torch.Generator().manual_seed(1000 * group_size + number)
        rollouts = sample(process, num_batches * GROUPS_A_BATCH, group_size, generator)
        for name in methods:
            batches = updates(process, CREDITS[name], rollouts, GROUPS_A_BATCH)
            findings.append(judge(process, name, batches, group_size))
    return findings


def table(findings: Sequence[Finding]) -> str:
    """Methods in lines, processes in columns."""
    processes = [process.name for process in PROCESSES]
    found = {(finding.method, finding.process): finding for finding in findings}
    lines = ["| credit | " + " | ".join(processes) + " |", "|---|" + "---|" * len(processes)]
    for name in dict.fromkeys(finding.method for finding in findings):
        cells = [cell(found[name, process]) for process in processes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(finding: Finding) -> str:
    if math.isnan(finding.scale):
        text = f"{finding.bias:.3f} ± {finding.bias_error:.3f}"
        text += f", {'more' if finding.more_turns > 0 else 'fewer'} turns" if finding.is_biased else ""
    elif abs(finding.signal) * math.sqrt(finding.num_batches) < QUANTILE_Z:
        text = "none of it"
    elif finding.signal < 0:
        text = f"against it; {finding.signal:.2f}"
    else:
        text = f"{100 * finding.bias:.1f} ± {100 * finding.bias_error:.1f} %; {finding.signal:.2f}"
    return f"**{text}**" if finding.is_biased else text


def section(findings: Sequence[Finding], by_size: Sequence[Finding]) -> str:
    """What stands between the marks of docs/credit.md."""
    graded = [process.name for process in PROCESSES if process.gradient().norm() > 1e-9]
    scale = {(finding.method, finding.process): f"{finding.scale:.3f}" for finding in findings}
    scales = "\n".join(f"| {name} | {' | '.join(scale[name, process] for process in graded)} |" for name in CREDITS)
    processes = "\n".join(f"- **{process.name}**: {process.meaning}." for process in PROCESSES)
    credits = "\n".join(f"- {name}: `{describe_credit(method)}`" for name, method in CREDITS.items())
    return f"""{BEGIN}
{processes}

Groups of {GROUP_SIZE}, {GROUPS_A_BATCH} groups a batch, {findings[0].num_batches} batches a cell. First three columns:
the part of the expected update that does not point along the gradient, in percent of the one that does, ± half its 95 %
interval; then the one that does, in standard deviations of one batch's update (more is less noise). Last two, where
the gradient is 0: the expected update in those standard deviations. **Bold**: biased, by a test at 0.001.

{table(findings)}

Expected update over gradient (1: unbiased without rescaling):

| credit | {" | ".join(graded)} |
|---|{"---|" * len(graded)}
{scales}

![Angle between expected update and gradient, or drift where there is none, over group size]({PLOT.name})

The credits:

{credits}

`make bias` wrote this; the plot has {by_size[0].num_batches} batches a point.
{END}"""


def plot(findings: Sequence[Finding], path: Path) -> None:
    """Over group size, a panel a process: the angle to the gradient, or the drift where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PROCESSES), figsize=(14, 3.6), layout="constrained")
    for axis, process in zip(axes, PROCESSES, strict=True):
        has_gradient = bool(process.gradient().norm() > 1e-9)
        axis.axhline(90 if has_gradient else 0, color="black", linewidth=0.8, linestyle="--")
        for number, name in enumerate(BY_SIZE):
            points = [f for f in findings if (f.method, f.process) == (name, process.name)]
            # side by side: many credits have the same value
            size = [f.group_size * 1.07 ** (number - len(BY_SIZE) // 2) for f in points]
            values, errors = zip(*(f.angle if has_gradient else f.drift for f in points), strict=True)
            marker = "osD^v<>"[number]
            axis.errorbar(size, values, errors, label=name, marker=marker, markersize=4, capsize=2, linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes := sorted({f.group_size for f in findings}), [str(size) for size in sizes])
        axis.set_title(process.name)
        axis.set_xlabel("group size")
        axis.grid(alpha=0.3)
        if has_gradient:
            axis.set_ylim(-10, 190)
            axis.set_yticks(range(0, 181, 45))
    axes[0].set_ylabel("update to gradient, degrees\n(above 90: against it)")
    axes[[bool(process.gradient().norm() > 1e-9) for process in PROCESSES].index(False)].set_ylabel(
        "update / its deviation\n(below 0: fewer turns)"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(BY_SIZE), frameon=False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bias", description=__doc__)
    parser.add_argument("--batches", type=int, default=8000, help="batches a cell")
    options = parser.parse_args(arguments)
    findings = study(options.batches)
    by_size = [f for size in GROUP_SIZES for f in study(options.batches // 4, group_size=size, methods=BY_SIZE)]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + section(findings, by_size) + rest.partition(END)[2])
    plot(by_size, PLOT)
    rows: list[Mapping[str, Any]] = [dataclasses.asdict(finding) for finding in (*findings, *by_size)]
    RESULTS.write_text(json.dumps(rows, indent=1).replace("NaN", "null") + "\n")
    print(table(findings))


if __name__ == "__main__":
    main()
