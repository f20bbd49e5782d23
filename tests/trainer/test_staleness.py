"""A sampler whose weights are not those that are trained is caught before the next step is taken."""

import asyncio
import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtpo.local_sampler import LocalSampler
from gtpo.policy import Policy
from gtpo.run_folder import read_rows
from gtpo.sampler import Sampler
from gtpo.staleness import StaleSampler, refuse_logprob_gap, refuse_other_version
from gtpo.trainer import Trainer
from tests.trainer.conftest import make_sampler, make_trajectory, make_turn, tiny_policy
from tests.trainer.test_trainer import make_trainer

# the bound that a run has of itself, and an update that moves the policy
OVERRIDES = ("--rollout.max_logprob_gap", "1e-3", "--train.learning_rate", "0.01", "--train.warmup_steps", "0")


class Elsewhere:
    """A sampler with weights of its own, as an engine in another process has. takes: what it does with new ones."""

    def __init__(self, sampler: Sampler, *, takes: str) -> None:
        assert isinstance(sampler, LocalSampler)
        self.inner = copy.copy(sampler)
        self.inner.policy = copy.deepcopy(sampler.policy)
        self.takes = takes
        self.loads: list[int] = []

    async def run(self, play: Any, **options: Any) -> Any:
        return await self.inner.run(play, **options)

    async def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.loads.append(version)
        if self.takes == "weights":
            own = self.inner.policy.weights()
            for name, weight in weights:
                own[name].data.copy_(weight.detach())
        if self.takes != "nothing":
            self.inner.version = version

    async def close(self) -> None:
        await self.inner.close()


def warm_trainer(folder: Path) -> Trainer:
    return make_trainer(folder, *OVERRIDES)


def weights_of(policy: Policy) -> list[Tensor]:
    return [weight.detach().clone() for weight in policy.model.parameters()]


def take_steps(trainer: Trainer, num: int) -> None:
    for step in range(num):
        before = weights_of(trainer.policy)
        trainer.step(step)
        assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(trainer.policy), strict=True))


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        ("nothing", r"^\d+ of \d+ turns were sampled by version 0 of the weights, the policy is at version 1: the sam"),
        (
            "name",
            r"^step 2: the sampler's log-probs of \d+ tokens are \d\S* nats .*max_logprob_gap is 0\.001: ",
        ),
    ],
)
def test_a_sampler_that_never_took_an_update_is_caught_before_the_second(
    tmp_path: Path, takes: str, message: str
) -> None:
    with warm_trainer(tmp_path) as trainer:
        trainer.warm_up_only()
        trainer.sampler = Elsewhere(trainer.sampler, takes=takes)
        take_steps(trainer, 1)
        before = weights_of(trainer.policy)
        with pytest.raises(StaleSampler, match=message) as caught:
            trainer.step(1)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer.policy), strict=True))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("num_updates", ["1", "2"])
def test_a_sampler_that_takes_the_weights_is_left_alone(tmp_path: Path, elsewhere: bool, num_updates: str) -> None:
    with make_trainer(tmp_path, *OVERRIDES, "--train.updates_per_rollout", num_updates) as trainer:
        trainer.warm_up_only()
        if elsewhere:
            trainer.sampler = Elsewhere(trainer.sampler, takes="weights")
        take_steps(trainer, 3)
        trainer.evaluate(step=3)
        if isinstance(trainer.sampler, Elsewhere):
            assert trainer.sampler.loads == [0, 1, 2, 3]
    run = tmp_path / "run"
    steps = [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "train"]
    assert max(row["sampling/sampling_logp_difference/mean"] for row in steps) < 1e-5
    assert {(row["step"], row["policy_version"]) for row in read_rows(run / "turns.jsonl")} == {(1, 0), (2, 1), (3, 2)}


def test_the_gap_is_a_mean_over_the_tokens_of_all_micro_batches() -> None:
    gaps = [torch.tensor([0.0, 0.0, 0.0]), torch.tensor([]), torch.tensor([0.36])]
    refuse_logprob_gap(gaps, bound=0.091, bfloat16=False, step=0)
    refuse_logprob_gap(gaps, bound=None, bfloat16=True, step=0)
    with pytest.raises(StaleSampler, match=r"^step 3: .* of 4 tokens are 0\.09 nats .* is 0\.08: "):
        refuse_logprob_gap(gaps, bound=0.08, bfloat16=True, step=2)
    with pytest.raises(StaleSampler, match=r"max_logprob_gap is 0\.001: "):
        refuse_logprob_gap(gaps, bound=None, bfloat16=False, step=0)
    refuse_logprob_gap([], bound=1e-9, bfloat16=False, step=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gap_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(StaleSampler):
        refuse_logprob_gap([torch.tensor([0.0, value])], bound=1e30, bfloat16=False, step=0)


def test_a_turn_that_no_known_version_sampled_is_refused() -> None:
    turns = [make_turn(), make_turn()]
    turns[0].policy_version = 4
    with pytest.raises(StaleSampler, match=r"^1 of 2 turns were sampled by version None of the weights"):
        refuse_other_version([[make_trajectory(*turns)]], version=4)


def test_our_own_sampler_takes_no_weights_but_those_that_it_shares(policy: Policy) -> None:
    sampler = make_sampler(policy)
    asyncio.run(sampler.load(policy.weights().items(), version=7))
    assert sampler.version == 7
    for name, weight in tiny_policy().model.named_parameters():
        with pytest.raises(ValueError, match=f"weights must be those of the policy, .* got another '{name}'"):
            asyncio.run(sampler.load([(name, weight)], version=8))
    with pytest.raises(ValueError, match="got another 'nothing'"):
        asyncio.run(sampler.load([("nothing", torch.zeros(1))], version=8))
    assert sampler.version == 7
