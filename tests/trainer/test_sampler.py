"""Sampling with a cache and continuous batching."""

import asyncio
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gtpo.attention import SlotCache
from gtpo.batch import pack
from gtpo.drawing import sample_tokens
from gtpo.local_sampler import LocalSampler
from gtpo.policy import Policy
from gtpo.sampler import SampledSequence
from gtpo_kernels import linear_token_logprobs
from tests.trainer import conftest
from tests.trainer.conftest import make_sequence, tiny_policy

STOP = 2
Record = tuple[list[int], list[bool], list[float]]


TEMPERATURE = 0.7


def make_sampler(policy: Policy, **changes: Any) -> LocalSampler:
    return conftest.make_sampler(policy, **({"stop_ids": [STOP], "join_steps": 2} | changes))


async def converse(sequence: SampledSequence, *, delay: random.Random | None = None) -> Record:
    """Up to three turns with made-up tool output between them: ids, which were sampled, log-probs."""
    rng = random.Random(sequence.number)
    ids: list[int] = []
    sampled: list[bool] = []
    logprobs: list[float] = []
    for _ in range(rng.randint(1, 3)):
        new = [rng.randrange(3, 250) for _ in range(rng.choice([1, 2, 5]))]
        completion = await sequence.sample(new, max_new_tokens=rng.randint(1, 6))
        ids += [*new, *completion.token_ids]
        sampled += [False] * len(new) + [True] * len(completion.token_ids)
        logprobs += [0.0] * len(new) + completion.logprobs
        if delay is not None:
            await asyncio.sleep(delay.random() * 0.01)
    return ids, sampled, logprobs


def run(sampler: LocalSampler, num: int = 8, *, delay: random.Random | None = None) -> list[Record]:
    seeds = [[0, i] for i in range(num)]
    return asyncio.run(sampler.run(lambda s: converse(s, delay=delay), seeds=seeds, temperature=TEMPERATURE))


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
@pytest.mark.parametrize("join_steps", [2, 0, -1])
def test_cached_logprobs_equal_a_forward_pass_from_scratch(changes: dict[str, object], join_steps: int) -> None:
    policy = tiny_policy(**changes)
    with torch.no_grad():
        policy.head.weight.mul_(20)  # far from uniform
    policy.hidden_states(pack([make_sequence([1, 2, 3])]))  # as after a training step
    sampler = make_sampler(policy, join_steps=join_steps)
    records = run(sampler)
    for ids, sampled, logprobs in records:
        batch = pack([make_sequence(ids)])
        hidden = policy.hidden_states(batch).detach()
        again = linear_token_logprobs(
            hidden, policy.head.weight.detach(), batch.targets, temperature=TEMPERATURE
        ).logprobs
        rows = torch.tensor(sampled[1:])
        torch.testing.assert_close(torch.tensor(logprobs[1:])[rows], again[rows], atol=1e-4, rtol=0)


def test_results_do_not_depend_on_slots(policy: Policy) -> None:
    # equal up to rounding of the batched products, which moves no sample here
    few, many = run(make_sampler(policy, num_slots=1)), run(make_sampler(policy, num_slots=8))
    assert [record[0] for record in few] == [record[0] for record in many]


def test_repeats_bit_for_bit_whatever_the_speed_of_the_tools(policy: Policy) -> None:
    records = [run(make_sampler(policy), delay=random.Random(seed)) for seed in (1, 2)]
    assert records[0] == records[1] == run(make_sampler(policy))


def test_a_completion_stops_at_the_stop_id_or_its_budget() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.head.weight.zero_()
    sampler = make_sampler(policy)

    async def start(sequence: SampledSequence) -> tuple[list[int], bool]:
        completion = await sequence.sample([5], max_new_tokens=50)
        return completion.token_ids, completion.finished

    completions = asyncio.run(sampler.run(start, seeds=[[i] for i in range(40)], temperature=TEMPERATURE))
    for ids, finished in completions:
        assert STOP not in ids[:-1] and finished == (ids[-1] == STOP) and (finished or len(ids) == 50)
    assert {finished for _, finished in completions} == {True, False}


def test_an_exception_of_one_ends_all(policy: Policy) -> None:
    cancelled = []

    async def start(sequence: SampledSequence) -> None:
        try:
            await sequence.sample([5, 6], max_new_tokens=2)
            if sequence.number == 1:
                raise KeyError("a fault of ours")
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(sequence.number)
            raise

    with pytest.raises(KeyError, match="a fault of ours"):
        asyncio.run(
            make_sampler(policy, num_slots=4).run(start, seeds=[[i] for i in range(3)], temperature=TEMPERATURE)
        )
    assert sorted(cancelled) == [0, 2]


def test_nan_logits_are_an_error_not_a_token() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.head.weight[7] = math.nan
    with pytest.raises(FloatingPointError, match=r"logits are NaN or infinite at decoding step 0"):
        run(make_sampler(policy))


def test_every_end_is_reported_once(policy: Policy) -> None:
    ends: list[None] = []
    asyncio.run(
        make_sampler(policy).run(
            converse, seeds=[[i] for i in range(5)], temperature=TEMPERATURE, on_finished=lambda: ends.append(None)
        )
    )
    assert len(ends) == 5


@pytest.mark.parametrize(
    ("new_ids", "max_new_tokens", "message"),
    [
        ([], 1, "at least one token for a new sequence, got none"),
        ([5], 0, "max_new_tokens must be at least 1, got 0"),
        (
            [5] * 60,
            5,
            "must fit the sampler's max_tokens = 64, got 0 tokens so far, 60 new ones and max_new_tokens = 5",
        ),
    ],
)
def test_bad_requests_are_refused(policy: Policy, new_ids: list[int], max_new_tokens: int, message: str) -> None:
    async def start(sequence: SampledSequence) -> None:
        await sequence.sample(new_ids, max_new_tokens=max_new_tokens)

    with pytest.raises(ValueError, match=message):
        asyncio.run(make_sampler(policy).run(start, seeds=[[0]], temperature=TEMPERATURE))


def test_a_sequence_can_fill_its_slot(policy: Policy) -> None:
    async def start(sequence: SampledSequence) -> int:
        return len((await sequence.sample([5] * 60, max_new_tokens=4)).token_ids)

    (length,) = asyncio.run(make_sampler(policy).run(start, seeds=[[1]], temperature=TEMPERATURE))
    assert 1 <= length <= 4


LOGIT = st.one_of(st.floats(-200, 200, width=32), st.just(-math.inf))


@given(
    logits=st.lists(LOGIT, min_size=1, max_size=9).filter(lambda row: max(row) > -math.inf),
    uniform=st.floats(0, 1, exclude_max=True) | st.just(math.nextafter(1.0, 0.0)) | st.just(0.0),
    temperature=st.floats(0.2, 2.0),
)
def test_tokens_of_probability_0_are_never_sampled(logits: list[float], uniform: float, temperature: float) -> None:
    tokens, logprobs = sample_tokens(
        torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), temperature=temperature
    )
    expected = torch.log_softmax(torch.tensor(logits) / temperature, dim=-1)
    assert math.isfinite(logprobs[0]) and expected[tokens[0]].double().exp() > 0
    torch.testing.assert_close(logprobs[0], expected[tokens[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    grid = (torch.arange(3000).double() + 0.5) / 3000
    tokens, _ = sample_tokens(logits.expand(3000, 3), grid, temperature=temperature)
    shares = torch.bincount(tokens, minlength=3) / 3000
    torch.testing.assert_close(shares, torch.softmax(logits / temperature, 0), atol=1e-3, rtol=0)


def test_the_cache_grows_with_what_is_used_and_changes_no_bit(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 slots of 4096 tokens are asked for; 8 sequences of at most 30 take what they take."""
    sizes: list[tuple[int, ...]] = []
    update = SlotCache.update

    def seen(self: SlotCache, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        buffers = update(self, key, value, layer)
        sizes.append(tuple(buffers[0].shape))
        return buffers

    def records(most: int) -> list[Record]:
        return run(make_sampler(policy, num_slots=128, max_tokens=most))

    monkeypatch.setattr(SlotCache, "update", seen)
    grown = records(500)
    longest = max(len(ids) for ids, _, _ in grown)
    slots, _, tokens, _ = max(sizes, key=math.prod)
    assert slots == 8 and tokens < 2 * longest < 80
    assert len(set(sizes)) > 2
    # as if everything had been there from the beginning
    monkeypatch.setattr("gtpo.attention._grown", lambda capacity, needed, *, most: most)
    assert records(500) == grown and sizes[-1][::2] == (128, 500)
