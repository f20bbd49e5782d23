"""When sequences join the sampler's steps: a clock of decoding steps in place of time, tools of any latency."""

import asyncio
import dataclasses
import selectors
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gtpo.attention import SlotCache
from gtpo.local_sampler import _Run
from gtpo.policy import Policy
from gtpo.sampler import SampledSequence
from tests.trainer.conftest import make_sampler

# of each trajectory, for each of its turns: sampled tokens, and decoding steps for which its tool is away
Plan = list[list[tuple[int, float]]]
PLANS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0, 2.5, 7.0, 40.0])), min_size=1, max_size=4),
    min_size=1,
    max_size=7,
)
MAX_LOOKS = 200


class StepClock(asyncio.SelectorEventLoop):
    """An event loop whose time is counted in decoding steps: a step of the model takes 1, all else nothing.

    Where nothing is left to do it goes on to the next timer; it raises where no timer is left, and where it is asked
    MAX_LOOKS times without that a step is made or time goes on.
    """

    def __init__(self) -> None:
        loop = self
        self.now = 0.0
        self.looks = 0

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.looks += 1
                if timeout is None or loop.looks > MAX_LOOKS:
                    raise AssertionError(f"waits for ever, at {loop.now} after {loop.looks} looks")
                if timeout > 0:
                    # what comes out of the subtraction of two times must not fall short of the timer
                    loop.now, loop.looks = loop.now + timeout + 1e-9, 0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        done, result = self.create_future(), func(*args)
        self.call_later(1.0, lambda: done.cancelled() or done.set_result(result))
        return done


@dataclasses.dataclass
class Steps:
    """A policy that gives the same logits to all, and keeps who took part in which step."""

    max_tokens = 64
    slots: list[list[int]] = dataclasses.field(default_factory=list)
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def extend(self, input_ids: Tensor, cache: SlotCache) -> Tensor:
        self.slots.append(list(cache.slots))
        return torch.zeros(len(cache.slots), 3)


def play(
    plan: Plan, *, join_steps: int, num_slots: int, latencies: bool = True
) -> tuple[float, float, list[list[int]]]:
    """The steps until all have ended, the longest that a timer was late, and the slots of each step."""
    policy = Steps()
    sampler = make_sampler(cast(Policy, policy), num_slots=num_slots, join_steps=join_steps)
    late = 0.0

    async def start(sequence: SampledSequence) -> None:
        nonlocal late
        loop = asyncio.get_running_loop()
        for num_tokens, latency in plan[sequence.number]:
            await sequence.sample([1, 2], max_new_tokens=num_tokens)
            due = loop.time() + latency * latencies
            await asyncio.sleep(latency * latencies)
            late = max(late, loop.time() - due)

    with asyncio.Runner(loop_factory=StepClock) as runner:
        runner.run(sampler.run(start, seeds=[[i] for i in range(len(plan))], temperature=1.0))
        took = runner.get_loop().time()
    return took, late, policy.slots


def alone(turns: list[tuple[int, float]]) -> float:
    # a tool that is back in the middle of a step joins the next
    return sum(num_tokens + latency + 1 for num_tokens, latency in turns)


@given(plan=PLANS)
@example(plan=[[(1, 40.0), (2, 0.3)], [(4, 0.0)] * 4, [(2, 7.0)] * 3])
@example(plan=[[(2, 7.0)] * 4] * 7)
def test_joined_at_once_a_run_takes_no_longer_than_its_slowest_trajectory(plan: Plan) -> None:
    took, late, _ = play(plan, join_steps=-1, num_slots=len(plan))
    assert took <= max(map(alone, plan)) + 1e-3
    # the event loop comes to what is due after each step
    assert late <= 1.0 + 1e-3


@settings(max_examples=60)
@given(plan=PLANS, num_slots=st.integers(1, 3))
def test_a_slot_that_comes_free_is_taken(plan: Plan, num_slots: int) -> None:
    """With fewer slots than trajectories: no later than if they were dealt out one by one, the longest the last."""
    took, late, _ = play(plan, join_steps=-1, num_slots=num_slots)
    costs = [alone(turns) + 1 for turns in plan]
    assert took <= sum(costs) / num_slots + max(costs) + 1e-3
    assert late <= 1.0 + 1e-3


@settings(max_examples=40)
@given(plan=PLANS, num_slots=st.integers(1, 7), join_steps=st.integers(0, 5))
def test_joined_after_fixed_steps_no_step_depends_on_latencies(plan: Plan, num_slots: int, join_steps: int) -> None:
    took, late, steps = play(plan, join_steps=join_steps, num_slots=num_slots)
    instant, _, expected = play(plan, join_steps=join_steps, num_slots=num_slots, latencies=False)
    assert steps == expected
    assert took <= instant + sum(latency for turns in plan for _, latency in turns) + 1e-3
    assert late <= 1.0 + 1e-3


def test_the_event_loop_runs_while_the_model_decodes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool of many short waits gets through them all during one step."""
    answered, extend = threading.Event(), Policy.extend

    def slow(self: Policy, input_ids: Tensor, cache: SlotCache) -> Tensor:
        # a step that ends when the tool has
        if len(cache.slots) == 1 and cache.lengths[0] > 3:
            assert answered.wait(60), "no other coroutine ran while the model decoded"
        return extend(self, input_ids, cache)

    monkeypatch.setattr(Policy, "extend", slow)

    async def start(sequence: SampledSequence) -> None:
        await sequence.sample([5, 6], max_new_tokens=1 + 3 * sequence.number)
        if sequence.number == 0:
            for _ in range(50):
                await asyncio.sleep(0)
            answered.set()

    sampler = make_sampler(policy, num_slots=2, join_steps=-1)
    asyncio.run(sampler.run(start, seeds=[[0], [1]], temperature=1.0))


def test_a_cancelled_run_waits_for_its_step(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on with the model after the run has ended."""
    begun, ended = threading.Event(), threading.Event()
    extend = Policy.extend

    def slow(self: Policy, input_ids: Tensor, cache: SlotCache) -> Tensor:
        begun.set()
        logits = extend(self, input_ids, cache)
        ended.wait(0.2)
        ended.set()
        return logits

    monkeypatch.setattr(Policy, "extend", slow)

    async def start(sequence: SampledSequence) -> None:
        await sequence.sample([5, 6], max_new_tokens=20)

    async def run() -> None:
        sampler = make_sampler(policy, num_slots=1, join_steps=0)
        running = asyncio.create_task(sampler.run(start, seeds=[[0]], temperature=1.0))
        with ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(pool, begun.wait)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert ended.is_set()

    asyncio.run(run())


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host waits until the device has a value."""

    OPS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.OPS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [2048, 5])
def test_the_host_waits_for_the_device_once_a_step(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    reads: list[int] = []
    decode, tolist = _Run._decode, Tensor.tolist
    with HostReads() as counting:
        assert int(torch.ones(1)) == 1 and counting.count == 1

    def counted(self: Any, parts: Any) -> Any:
        with HostReads() as counting:

            def read(tensor: Tensor) -> Any:
                counting.count += 1
                return tolist(tensor)

            for name in ("tolist", "cpu", "numpy"):
                monkeypatch.setattr(Tensor, name, read)
            sampled = decode(self, parts)
        monkeypatch.undo()
        reads.append(counting.count)
        return sampled

    async def start(sequence: SampledSequence) -> None:
        # prompts that are shared, prompts that are not, tool output
        await sequence.sample([5, 6, 7, 8, 9, 10, 11 + sequence.number // 3], max_new_tokens=3)
        await sequence.sample([7] * 9, max_new_tokens=2)

    patched = pytest.MonkeyPatch()
    patched.setattr(_Run, "_decode", counted)
    sampler = make_sampler(policy, num_slots=5, prefill_tokens_per_step=budget)
    try:
        asyncio.run(sampler.run(start, seeds=[[i] for i in range(7)], temperature=1.0))
    finally:
        patched.undo()
    assert len(reads) > 10 and set(reads) == {1}
