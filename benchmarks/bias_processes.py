"""Small decision processes with a known policy gradient, and trajectories sampled from them, for `benchmarks.bias`.

A policy of one logit an observation writes tokens, each one of two; tokens make up turns, turns a trajectory.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

End = Literal["answer", "truncated", "void"]
ENDS: tuple[End, ...] = ("answer", "truncated", "void")


@dataclass(frozen=True)
class Branch:
    """What a token may lead to. state: the next token's, None where the trajectory ends; the reward is paid then.

    ends_turn: the next token, if there is one, begins a turn. end: how the trajectory ends, if it does.
    """

    probability: float
    reward: float
    state: int | None
    ends_turn: bool = True
    end: End = "answer"


Branches = tuple[Sequence[Branch], Sequence[Branch]]


@dataclass(frozen=True)
class Process:
    """A decision process with two tokens. branches: [state][token]. logits: of token 1, by observation [D].

    start: probability of each state to be a group's first, drawn once a group: its task.
    sampled: the logits that trajectories are sampled with, where they are not those of the gradient.
    """

    name: str
    meaning: str
    branches: Sequence[Branches]
    observations: Sequence[int]
    logits: Sequence[float]
    start: Sequence[float]
    sampled: Sequence[float] | None = None

    def objective(self, logits: Tensor) -> Tensor:
        """Expected sum of rewards, differentiable; a state leads to later ones only."""
        values: dict[int | None, Tensor] = {None: logits.new_zeros(())}
        for state in reversed(range(len(self.branches))):
            chance = torch.sigmoid(logits[self.observations[state]])
            of_token = [
                torch.stack([b.probability * (b.reward + values[b.state]) for b in branches]).sum()
                for branches in self.branches[state]
            ]
            values[state] = (1 - chance) * of_token[0] + chance * of_token[1]
        return torch.stack([p * values[state] for state, p in enumerate(self.start)]).sum()

    def gradient(self) -> Tensor:
        """[D] float64, exact."""
        logits = torch.tensor(self.logits, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.objective(logits), logits)[0]

    @property
    def has_gradient(self) -> bool:
        return bool(self.gradient().norm() > 1e-9)


def ends(chance: float, reward: float = 1.0, shift: float = 0.0) -> list[Branch]:
    """The end, with `reward` in so many cases, and `shift` in all."""
    return [Branch(chance, reward + shift, None), Branch(1.0 - chance, shift, None)]


def first_of(num_states: int) -> list[float]:
    """All groups start in state 0."""
    return [1.0] + [0.0] * (num_states - 1)


def call_or_answer(name: str, meaning: str, chances: Sequence[float], pay: Sequence[Branch], refund: float) -> Process:
    """Turns of one token: 1 calls once more and is paid for it, 0 answers, right with a chance that the turn has."""
    branches: list[Branches] = []
    for turn, chance in enumerate(chances):
        answer = ends(chance, shift=-refund * turn)
        more = [dataclasses.replace(branch, state=turn + 1) for branch in pay]
        branches.append((answer, more if turn + 1 < len(chances) else answer))
    return Process(name, meaning, branches, range(len(chances)), [0.4] * len(chances), first_of(len(chances)))


def two_tasks() -> Process:
    """An easy and a hard task, two turns each. In the one the first turn matters, in the other the second."""
    branches: list[Branches] = [
        ([Branch(1.0, 0.0, 2)], [Branch(1.0, 0.0, 3)]),  # easy, first turn
        ([Branch(1.0, 0.0, 4)], [Branch(1.0, 0.0, 4)]),  # hard, first turn
        (ends(0.70), ends(0.70)),  # easy, first token 0
        (ends(0.95), ends(0.95)),  # easy, first token 1
        (ends(0.20), ends(0.55)),  # hard
    ]
    meaning = "an easy task, in which the first turn matters, and a hard one, in which the second does"
    return Process("two tasks", meaning, branches, [0, 0, 1, 1, 1], [0.0, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0])


def writing() -> Process:
    """A query of 1 to 3 tokens, which helps by its length, then an answer of 1 to 3, which its length harms."""
    branches: list[Branches] = []
    for position in range(3):  # states 0 to 2: of the query; the answer to each length of it has three more
        sent = [Branch(1.0, 0.0, 3 + 3 * position)]
        more = [Branch(1.0, 0.0, position + 1, ends_turn=False)]
        branches.append((sent, more if position < 2 else sent))
    for state in range(3, 12):
        query, position = divmod(state - 3, 3)
        answer = ends(0.35 + 0.25 * query - 0.15 * position)
        more = [Branch(1.0, 0.0, state + 1, ends_turn=False)]
        branches.append((answer, more if position < 2 else answer))
    meaning = "a query of 1 to 3 tokens helps the longer it is, an answer of 1 to 3 the shorter it is"
    return Process("writing", meaning, branches, [0, 1, 2, *[3, 4, 5] * 3], [0.5] * 6, first_of(12))


def padding() -> Process:
    """A first turn shows how likely the answer is right; where it hardly is, the second turn may be of any length."""
    hint = [Branch(0.5, 0.0, 1), Branch(0.5, 0.0, 2)]
    branches: list[Branches] = [(hint, hint), (ends(0.9), ends(0.9))]
    for position in range(6):
        stop = ends(0.1)
        branches.append((stop, [Branch(1.0, 0.0, 3 + position, ends_turn=False)] if position < 5 else stop))
    meaning = "bad luck is seen, and then as many words are made as one likes: no gradient"
    return Process("padding", meaning, branches, [0, 1, *[2] * 6], [0.0, 0.0, 0.5], first_of(len(branches)))


def limits() -> Process:
    """A turn that may be void, then an answer that may run into the limit: both fail, and masks leave them out."""
    branches: list[Branches] = [
        ([Branch(1.0, 0.0, None, end="void")], [Branch(1.0, 0.0, 1)]),  # token 0 is no call
    ]
    for position, chance in enumerate((0.3, 0.5, 0.7)):
        more = [Branch(1.0, 0.0, 2 + position, ends_turn=False)]
        at_the_limit = [Branch(0.5, 1.0, None), Branch(0.5, 0.0, None, end="truncated")]
        branches.append((ends(chance), more if position < 2 else at_the_limit))
    meaning = "a first turn that is no call is void, the longest answer is cut off half of the time: both fail"
    return Process("limits", meaning, branches, range(4), [0.8, 0.2, 0.2, 0.2], first_of(4))


FREE = [Branch(1.0, 0.0, 0)]
SEARCH = call_or_answer(
    "search", "each call makes the answer likelier to be right", [0.1, 0.35, 0.55, 0.7, 0.8], FREE, 0.0
)
PROCESSES = [
    SEARCH,
    two_tasks(),
    call_or_answer(
        "paid calls",
        "calls are paid 0.3 or -0.1, and change nothing else",
        [0.5] * 5,
        [Branch(0.5, 0.3, 0), Branch(0.5, -0.1, 0)],
        0.0,
    ),
    writing(),
    limits(),
    dataclasses.replace(
        SEARCH,
        name="late",
        meaning="search, from trajectories of the policy some updates ago, when calls were rarer: ratios 0.64 to 1.6",
        sampled=[0.3, 0.1, -0.1, -0.3, -0.5],
    ),
    call_or_answer("luck", "answers are right by chance, whatever was done: no gradient", [0.5] * 5, FREE, 0.0),
    call_or_answer(
        "loan",
        "a call is paid 0.2, which the answer gives back: no gradient",
        [0.5] * 5,
        [Branch(1.0, 0.2, 0)],
        0.2,
    ),
    padding(),
]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Trajectories of groups of `group_size` in a row.

    Flat over tokens [N]: states, tokens, turn_ids; cu_tokens [B+1]. Flat over turns [K]: rewards, anchors (the state at
    a turn's first token); cu_turns [B+1]. By trajectory [B]: outcomes (the last turn's reward), ends (into `ENDS`).
    """

    states: Tensor
    tokens: Tensor
    turn_ids: Tensor
    cu_tokens: Tensor
    rewards: Tensor
    anchors: Tensor
    cu_turns: Tensor
    outcomes: Tensor
    ends: Tensor
    group_size: int


def sample(process: Process, num_groups: int, group_size: int, generator: torch.Generator) -> Rollouts:
    """Plays all trajectories at once, a token after the other."""
    most = max(len(branches) for pair in process.branches for branches in pair)
    shape = (len(process.branches), 2, most)
    chance, reward = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    following, ends_turn, end = torch.full(shape, -1), torch.ones(shape, dtype=torch.bool), torch.zeros(shape).long()
    for state, pair in enumerate(process.branches):
        for token, branches in enumerate(pair):
            for number, branch in enumerate(branches):
                at = (state, token, number)
                chance[at], reward[at], end[at] = branch.probability, branch.reward, ENDS.index(branch.end)
                following[at] = -1 if branch.state is None else branch.state
                ends_turn[at] = branch.ends_turn or branch.state is None
    act = torch.sigmoid(torch.tensor(process.sampled or process.logits))[torch.tensor(process.observations)]
    start = torch.multinomial(torch.tensor(process.start), num_groups, replacement=True, generator=generator)
    state = start.repeat_interleave(group_size)
    steps = []
    while (state >= 0).any():
        alive, at = state >= 0, state.clamp(min=0)
        token = (torch.rand(len(state), generator=generator) < act[at]).long()
        branch = torch.multinomial(chance[at, token], 1, generator=generator).squeeze(1)
        here = (at, token, branch)
        steps.append((alive, at, token, reward[here], ends_turn[here], end[here]))
        state = torch.where(alive, following[here], -1)
    alive, states, tokens, paid, last_of_turn, end_of = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    cu_tokens, cu_turns = (
        torch.cat([torch.zeros(1, dtype=torch.long), (alive & counted).sum(dim=1).cumsum(0)])
        for counted in (alive, last_of_turn)
    )
    closes = last_of_turn[alive]
    turn_ids = closes.cumsum(0) - closes.long()
    rewards = torch.zeros(int(cu_turns[-1]), dtype=torch.float64).index_add_(0, turn_ids, paid[alive])
    return Rollouts(
        states=states[alive],
        tokens=tokens[alive],
        turn_ids=turn_ids,
        cu_tokens=cu_tokens,
        rewards=rewards,
        anchors=states[alive][torch.cat([torch.ones(1, dtype=torch.bool), closes[:-1]])],
        cu_turns=cu_turns,
        outcomes=rewards[cu_turns[1:] - 1],
        ends=end_of[alive][cu_tokens[1:] - 1],
        group_size=group_size,
    )
