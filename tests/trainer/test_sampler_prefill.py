"""Prompts and tool output in the sampler: computed once for all that begin alike, in parts where they are long."""

import asyncio
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtpo.attention import SlotCache
from gtpo.batch import pack
from gtpo.policy import Policy
from gtpo.sampler import SampledSequence
from gtpo_kernels import linear_token_logprobs
from tests.trainer.conftest import make_sampler, make_sequence

PROMPTS = [[*range(5 + i, 25 + i)] for i in range(3)]
Record = tuple[list[int], list[bool], list[float]]


class Steps:
    """Keeps, of each decoding step, the tokens that each slot is given, and does what the policy does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[list[int]] = []
        extend = Policy.extend

        def kept(policy: Policy, input_ids: Tensor, cache: SlotCache) -> Tensor:
            assert len(input_ids) == sum(cache.new_lengths)
            self.lengths.append(list(cache.new_lengths))
            return extend(policy, input_ids, cache)

        monkeypatch.setattr(Policy, "extend", kept)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))


def play_turns(
    policy: Policy, prompts: Sequence[list[int]], *, num_turns: int = 1, num_tokens: int = 4, **options: int
) -> list[Record]:
    """One sequence a prompt, with made-up tool output of 1 to 12 tokens between its turns."""

    async def play(sequence: SampledSequence) -> Record:
        rng = random.Random(sequence.number)
        ids: list[int] = []
        sampled: list[bool] = []
        logprobs: list[float] = []
        new = prompts[sequence.number]
        for _ in range(num_turns):
            completion = await sequence.sample(new, max_new_tokens=rng.randint(1, num_tokens))
            ids += [*new, *completion.token_ids]
            sampled += [False] * len(new) + [True] * len(completion.token_ids)
            logprobs += [0.0] * len(new) + completion.logprobs
            new = [rng.randrange(3, 250) for _ in range(rng.randint(1, 12))]
        return ids, sampled, logprobs

    sampler = make_sampler(policy, **({"num_slots": 8, "max_tokens": 200} | options))
    return asyncio.run(sampler.run(play, seeds=[[0, i] for i in range(len(prompts))], temperature=0.7))


def assert_as_from_scratch(policy: Policy, records: Sequence[Record]) -> None:
    for ids, sampled, logprobs in records:
        batch = pack([make_sequence(ids)])
        hidden = policy.hidden_states(batch).detach()
        again = linear_token_logprobs(hidden, policy.head.weight.detach(), batch.targets, temperature=0.7).logprobs
        rows = torch.tensor(sampled[1:])
        torch.testing.assert_close(torch.tensor(logprobs[1:])[rows], again[rows], atol=1e-4, rtol=0)


def test_a_prompt_is_computed_once_for_its_group(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    records = play_turns(policy, [prompt for prompt in PROMPTS[:2] for _ in range(4)])
    # then the prompt's last token for each of the others
    assert steps.lengths[0] == [20, 20] and sorted(steps.lengths[1])[-1] == 1
    num_decoded = sum(sum(sampled) - 1 for _, sampled, _ in records)
    assert steps.num_tokens == 2 * 20 + 6 + num_decoded
    assert_as_from_scratch(policy, records)


def test_one_that_gets_its_slot_later_takes_the_prompt_of_one_that_runs(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    records = play_turns(policy, [PROMPTS[0]] * 7, num_turns=3, num_tokens=9, num_slots=3)
    assert [length for lengths in steps.lengths for length in lengths if length >= 20] == [20]
    assert_as_from_scratch(policy, records)


def test_only_the_whole_prompt_is_shared(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one token, prompts that begin alike, and a prompt that is the beginning of another."""
    steps = Steps(monkeypatch)
    prompts = [[7], [7], PROMPTS[0], [*PROMPTS[0], 9], [*PROMPTS[0][:-1], 8]]
    records = play_turns(policy, prompts)
    assert sorted(steps.lengths[0]) == [1, 1, 20, 20, 21]
    assert_as_from_scratch(policy, records)


def test_a_long_prompt_holds_nobody_up(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    long = [3 + i % 200 for i in range(100)]
    records = play_turns(policy, [[5], long, [6], long], num_tokens=30, prefill_tokens_per_step=9)
    for lengths in steps.lengths:
        assert sum(length for length in lengths if length > 1) <= 9
    # 100 tokens after the one of the first, beside which the first goes on; the other of this prompt waits
    assert steps.lengths[0] == [1, 8]
    assert all(len(lengths) >= 2 for lengths in steps.lengths[1:6])
    num_decoded = sum(sum(sampled) - 1 for _, sampled, _ in records)
    assert steps.num_tokens == 100 + 1 + 1 + 1 + num_decoded
    assert_as_from_scratch(policy, records)


def test_a_budget_below_every_prompt_gets_through_all_of_them(policy: Policy) -> None:
    prompts = [PROMPTS[i % 3] for i in range(6)]
    parts = play_turns(policy, prompts, num_turns=3, prefill_tokens_per_step=1)
    assert [ids for ids, _, _ in parts] == [ids for ids, _, _ in play_turns(policy, prompts, num_turns=3)]
    assert_as_from_scratch(policy, parts)


@settings(max_examples=15)
@given(
    chosen=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    num_slots=st.integers(1, 9),
    budget=st.sampled_from([1, 3, 19, 20, 50, 2048]),
    join_steps=st.integers(0, 2),
)
def test_what_is_sampled_depends_on_no_neighbour_and_repeats(
    policy: Policy, chosen: list[int], num_slots: int, budget: int, join_steps: int
) -> None:
    prompts = [PROMPTS[i] for i in chosen]
    options = {"num_slots": num_slots, "prefill_tokens_per_step": budget, "join_steps": join_steps}
    records = play_turns(policy, prompts, num_turns=2, **options)
    assert records == play_turns(policy, prompts, num_turns=2, **options)
    alone = play_turns(policy, prompts, num_turns=2, num_slots=1)
    assert [ids for ids, _, _ in records] == [ids for ids, _, _ in alone]
    for one, two in zip(records, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one[2]), torch.tensor(two[2]), atol=1e-5, rtol=0)


def test_those_that_wait_for_a_prompt_get_on_when_the_one_that_computes_it_ends(policy: Policy) -> None:
    async def play(sequence: SampledSequence) -> int:
        sampling = sequence.sample(PROMPTS[0], max_new_tokens=3)
        if sequence.number == 0:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sampling, timeout=0)
            return 0
        return len((await sampling).token_ids)

    sampler = make_sampler(policy, prefill_tokens_per_step=5)
    played = asyncio.run(sampler.run(play, seeds=[[i] for i in range(3)], temperature=1.0))
    assert played == [0, 3, 3]


def test_a_budget_of_nothing_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="prefill_tokens_per_step must be at least 1, got 0"):
        make_sampler(policy, prefill_tokens_per_step=0)
