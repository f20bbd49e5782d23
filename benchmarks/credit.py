"""`make bench-credit`: `turn_advantages`, rewards and turn ids to one advantage a token, on the CPU.

Beside it two loops of verl 0.9.1, restated from `verl/trainer/ppo/core_algos.py`: the advantage of
`compute_grpo_outcome_advantage`, and the token returns of `compute_reinforce_plus_plus_outcome_advantage`.  Each is
held against our call that computes the same.  The floor is one indexed read for every token.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import (
    Contestant,
    Outputs,
    Row,
    compare,
    find,
    parse_arguments,
    publish,
    set_ratios,
    smoke_run,
)
from gtpo_kernels import turn_advantages

GAMMA, EPS = 0.9, 1e-6
GROUP_SIZE, TURNS_EACH = 8, 8
CPU_BACKENDS = ("cpp", "torch")
FLOOR, GRPO_LOOP, RETURNS_LOOP = "floor: one read a token", "verl's GRPO loop", "verl's token-return loop"
ROUNDS, VERL_ROUNDS, GROWTH_ROUNDS = 21, 5, 5


@dataclass(frozen=True)
class CreditBatch:
    """Trajectories of TURNS_EACH turns of equal length, every token sampled: what verl's padded loops can hold.

    turn_rewards [K], cu_turns [B+1], group_ids [B], turn_ids [N].  outcomes: [K], the last turn of each trajectory
    rewarded alone, which is all that GRPO knows.
    """

    turn_rewards: Tensor
    outcomes: Tensor
    cu_turns: Tensor
    group_ids: Tensor
    turn_ids: Tensor

    @property
    def num_trajectories(self) -> int:
        return len(self.group_ids)

    def token_rewards(self, turn_rewards: Tensor) -> Tensor:
        """[B, T]: the reward of a turn at its last token."""
        rewards = torch.zeros(len(turn_rewards), len(self.turn_ids) // len(turn_rewards))
        rewards[:, -1] = turn_rewards
        return rewards.view(self.num_trajectories, -1)


def make_batch(num_trajectories: int, tokens_a_turn: int) -> CreditBatch:
    generator = torch.Generator().manual_seed(0)
    num_turns = num_trajectories * TURNS_EACH
    rewards = torch.rand(num_turns, generator=generator)
    last = torch.arange(num_turns) % TURNS_EACH == TURNS_EACH - 1
    return CreditBatch(
        rewards,
        rewards.masked_fill(~last, 0.0),
        torch.arange(0, num_turns + 1, TURNS_EACH),
        torch.arange(num_trajectories) // GROUP_SIZE,
        torch.arange(num_turns).repeat_interleave(tokens_a_turn),
    )


def exact_outputs(batch: CreditBatch) -> Outputs:
    """By plain Python: advantages of all turns in their group, those of GRPO, and returns without discount."""
    bounds = batch.cu_turns.tolist()

    def returns(rewards: Tensor, gamma: float) -> list[float]:
        values = rewards.double().tolist()
        for first, end in pairwise(bounds):
            for k in range(end - 2, first - 1, -1):
                values[k] += gamma * values[k + 1]
        return values

    def normalised(values: list[float], counted: Callable[[int], bool]) -> list[float]:
        groups = batch.group_ids.repeat_interleave(batch.cu_turns.diff()).tolist()
        pools: dict[int, list[float]] = defaultdict(list)
        for k, group in enumerate(groups):
            if counted(k):
                pools[group].append(values[k])
        scale = {group: (mean(pool), stdev(pool) + EPS) for group, pool in pools.items()}
        return [(value - scale[g][0]) / scale[g][1] for value, g in zip(values, groups, strict=True)]

    starts = set(bounds)
    by_turn = {
        "advantages": normalised(returns(batch.turn_rewards, GAMMA), lambda k: True),
        "grpo": normalised(returns(batch.outcomes, 1.0), lambda k: k in starts),
        "returns": returns(batch.turn_rewards, 1.0),
    }
    return {name: torch.tensor(values, dtype=torch.float64)[batch.turn_ids] for name, values in by_turn.items()}


def _gtpo(backend: str, batch: CreditBatch) -> Callable[[], Outputs]:
    others = (batch.cu_turns, batch.group_ids, batch.turn_ids)
    return lambda: {
        "advantages": turn_advantages(batch.turn_rewards, *others, gamma=GAMMA, eps=EPS, backend=backend).advantages
    }


def _grpo(backend: str, batch: CreditBatch) -> Callable[[], Outputs]:
    call = partial(turn_advantages, gamma=1.0, population="trajectories", eps=EPS, backend=backend)
    return lambda: {"grpo": call(batch.outcomes, batch.cu_turns, batch.group_ids, batch.turn_ids).advantages}


def _returns(backend: str, batch: CreditBatch) -> Callable[[], Outputs]:
    call = partial(turn_advantages, gamma=1.0, scope="none", backend=backend)
    return lambda: {"returns": call(batch.turn_rewards, batch.cu_turns, batch.group_ids, batch.turn_ids).advantages}


def verl_grpo_advantages(token_rewards: Tensor, mask: Tensor, uids: np.ndarray) -> Tensor:
    """[B, T]: verl 0.9.1, `compute_grpo_outcome_advantage`; SkyRL 0.3.0 has the same.  uids: [B], of the prompts."""
    scores = token_rewards.sum(dim=-1)
    by_group = defaultdict(list)
    for i in range(len(scores)):
        by_group[uids[i]].append(scores[i])
    pools = {uid: torch.stack(members) for uid, members in by_group.items()}
    scale = {uid: (pool.mean(), pool.std()) for uid, pool in pools.items()}
    for i in range(len(scores)):
        middle, spread = scale[uids[i]]
        scores[i] = (scores[i] - middle) / (spread + EPS)
    return scores.unsqueeze(-1) * mask


def _verl_grpo(batch: CreditBatch) -> Callable[[], Outputs]:
    token_rewards = batch.token_rewards(batch.outcomes)
    mask, uids = torch.ones_like(token_rewards), batch.group_ids.numpy()
    return lambda: {"grpo": verl_grpo_advantages(token_rewards, mask, uids).view(-1)}


def _verl_returns(batch: CreditBatch) -> Callable[[], Outputs]:
    """Without the whitening that follows there."""
    token_rewards = batch.token_rewards(batch.turn_rewards)
    mask = torch.ones_like(token_rewards)

    def loop() -> Outputs:
        returns = torch.zeros_like(token_rewards)
        running: Tensor | float = 0.0
        for t in reversed(range(token_rewards.shape[1])):
            running = token_rewards[:, t] + 1.0 * running
            returns[:, t] = running
            running = running * mask[:, t]
        return {"returns": returns.view(-1)}

    return loop


def _one_read(batch: CreditBatch) -> Callable[[], Outputs]:
    def read() -> Outputs:
        batch.turn_rewards.index_select(0, batch.turn_ids)
        return {}

    return read


def our_contestants(backends: Sequence[str] = CPU_BACKENDS) -> list[Contestant[CreditBatch]]:
    return [Contestant(f"turn_advantages, {backend}", backend, partial(_gtpo, backend)) for backend in backends]


ONE_READ = Contestant(FLOOR, "torch", _one_read)
CONTESTANTS = [
    ONE_READ,
    *our_contestants(),
    Contestant("turn_advantages as GRPO, cpp", "cpp", partial(_grpo, "cpp")),
    Contestant("turn_advantages as returns, cpp", "cpp", partial(_returns, "cpp")),
    Contestant(GRPO_LOOP, "verl, restated", _verl_grpo, max_rounds=VERL_ROUNDS),
    Contestant(RETURNS_LOOP, "verl, restated", _verl_returns, max_rounds=VERL_ROUNDS),
]


def measure_shape(
    contestants: Sequence[Contestant[CreditBatch]], num_trajectories: int, tokens_a_turn: int, rounds: int
) -> list[Row]:
    batch = make_batch(num_trajectories, tokens_a_turn)
    shape = {"B": num_trajectories, "K": len(batch.turn_rewards), "N": len(batch.turn_ids)}
    rows = compare(
        contestants,
        batch,
        exact_outputs(batch),
        lambda name, backend: Row(name, backend, shape, "float32"),
        allowed=1e-4,
        rounds=rounds,
        device=torch.device("cpu"),
        warm_up_batch=make_batch(16, 3),
    )
    set_ratios(rows, find(rows, FLOOR).cpu_s)
    return rows


def judge(rows: Sequence[Row]) -> None:
    """The gates of the `cpp` backend on the first table; a figure that is missing fails."""
    line = find(rows, "turn_advantages, cpp")
    for yardstick, least in ((GRPO_LOOP, 20), (RETURNS_LOOP, 30)):
        theirs = find(rows, yardstick).cpu_s
        line.gate(f"CPU <= 1/{least} {yardstick}", None not in (line.cpu_s, theirs) and line.cpu_s <= theirs / least)
    line.gate("CPU <= 1.3 x floor", line.ratio_to_floor is not None and line.ratio_to_floor <= 1.3)


def judge_growth(tables: Sequence[Sequence[Row]]) -> None:
    """CPU time a turn and token against the table before: at most doubled where the sizes grew tenfold."""

    def size(row: Row) -> int:
        return row.shape["K"] + row.shape["N"]

    for before, after in pairwise(tables):
        for small, large in zip(before, after, strict=True):
            if None in (small.cpu_s, large.cpu_s) or large.name == FLOOR:
                continue
            growth = (large.cpu_s / small.cpu_s) / (size(large) / size(small))
            large.ratios["x cost a token before"] = growth
            large.gate("cost a turn and token <= 2 x that of a tenth", growth <= 2.0)


CAPTION = """turn_advantages on the CPU.  CPU ms: of all threads; medians of interleaved rounds.  extra MiB: peak above
what was held before, outputs included.  x floor: CPU time over that of `index_select` of one value for every token.
errors: relative to float64.  The larger tables: cost a turn against a tenth of the size."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke):
        if options.smoke:
            rows = measure_shape(CONTESTANTS, 16, 3, rounds=1)
        else:
            rows = measure_shape(CONTESTANTS, 1024, 256, rounds=ROUNDS)
            judge(rows)
            sizes = (1_250, 12_500, 125_000)
            tables = [measure_shape([ONE_READ, *our_contestants()], size, 4, rounds=GROWTH_ROUNDS) for size in sizes]
            judge_growth(tables)
            rows += [row for table in tables for row in table]
    publish("bench-credit", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
