"""Sampling in this process with continuous batching: many sequences, each extended and sampled, with no turn barrier.

Every decoding step is one packed forward pass over the sequences that have something to do: one sampled token each, or
a part of a prompt or tool output. What such parts come to in a step is bounded, so that a long one holds nobody up, and
a prompt that several sequences begin with is computed once. Each sequence draws from its own stream of uniforms, one a
token, by inverting the cumulative distribution: what it samples does not depend on which others run beside it (up to
floating-point rounding). With `join_steps` of at least 0 the order of events is a function of step numbers alone, so a
run repeats bit for bit. The model runs in a thread of its own, so that tools get on while it does.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gtpo.attention import SlotCache
from gtpo.decoding_steps import LocalSequence, Part, plan_step
from gtpo.drawing import sample_tokens, uniforms_of
from gtpo.policy import Policy
from gtpo.sampler import Completion, SampledSequence

T = TypeVar("T")


class LocalSampler:
    """Samples with `policy` as it is at the time, `num_slots` sequences of at most `max_tokens` tokens at a time.

    stop_ids: those that end a completion. join_steps: see `RolloutConfig.tool_join_steps`; -1 joins at once.
    prefill_tokens_per_step: of prompts and tool output in one decoding step at most.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_slots: int,
        max_tokens: int,
        stop_ids: Collection[int],
        join_steps: int,
        prefill_tokens_per_step: int,
    ) -> None:
        if max_tokens > policy.max_tokens:
            raise ValueError(f"max_tokens must be at most the policy's {policy.max_tokens}, got {max_tokens}")
        if prefill_tokens_per_step < 1:
            raise ValueError(f"prefill_tokens_per_step must be at least 1, got {prefill_tokens_per_step}")
        self.policy = policy
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.stop_ids = frozenset(stop_ids)
        self.join_steps = join_steps
        self.prefill_tokens_per_step = prefill_tokens_per_step
        self.version = 0

    async def run(
        self,
        play: Callable[[SampledSequence], Awaitable[T]],
        *,
        seeds: Sequence[Sequence[int]],
        temperature: float,
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """`play(sequence)` for one sequence a seed, as slots come free; the results in the seeds' order.

        Raises what a `play` raised, after the others were cancelled.
        """
        # what a run holds, above all keys and values, goes with it: nothing of it is kept while the policy is trained
        return await _Run(self, play, temperature=temperature, on_finished=on_finished).results(seeds)

    async def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Names the policy's weights as they are now `version`. They are shared with the policy, so none is copied.

        Raises ValueError for weights that are not the policy's own, which would be ignored.
        """
        own = self.policy.weights()
        for name, weight in weights:
            if name not in own or own[name].data_ptr() != weight.data_ptr():
                raise ValueError(
                    f"weights must be those of the policy, which a LocalSampler shares; got another {name!r}"
                )
        self.version = version

    async def close(self) -> None:
        """Nothing is held between runs."""


class _Sampled(NamedTuple):
    token: int
    logprob: float


class _Run(Generic[T]):
    """One run of a `LocalSampler`: its sequences, their cache, and the loop of decoding steps."""

    def __init__(
        self,
        sampler: LocalSampler,
        play: Callable[[SampledSequence], Awaitable[T]],
        *,
        temperature: float,
        on_finished: Callable[[], None],
    ) -> None:
        self._sampler = sampler
        self._play = play
        self._temperature = temperature
        self._on_finished = on_finished
        self._changed = asyncio.Event()
        self._cache = SlotCache(sampler.num_slots, sampler.max_tokens)
        self._step = 0
        self._running: list[LocalSequence] = []

    async def results(self, seeds: Sequence[Sequence[int]]) -> list[T]:
        sampler = self._sampler
        waiting = [
            LocalSequence(i, uniforms_of(seed, sampler.max_tokens), self._changed) for i, seed in enumerate(seeds)
        ]
        waiting.reverse()
        tasks: list[asyncio.Task[T]] = []
        loop, decoder = asyncio.get_running_loop(), ThreadPoolExecutor(max_workers=1)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < sampler.num_slots:
                    sequence = waiting.pop()
                    sequence.slot = len(self._running)
                    sequence.due_step = self._step
                    self._running.append(sequence)
                    tasks.append(asyncio.create_task(self._drive(sequence)))
                await self._settle(tasks)
                self._release_closed()
                parts = plan_step(self._running, step=self._step, budget=sampler.prefill_tokens_per_step)
                if parts:
                    # nothing that the thread reads of these sequences changes before it has ended
                    self._append(parts, await loop.run_in_executor(decoder, self._decode, parts))
                    # those that need no tool are back by the next step
                    await asyncio.sleep(0)
                elif self._running:
                    # never back: what has ended at a later step would not be released
                    self._step = max(self._step, min(sequence.due_step for sequence in self._running))
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            decoder.shutdown()

    async def _drive(self, sequence: LocalSequence) -> T:
        try:
            return await self._play(sequence)
        finally:
            sequence.closed = True
            self._changed.set()
            self._on_finished()

    async def _settle(self, tasks: list[asyncio.Task[T]]) -> None:
        """Waits until every sequence that is due has asked for more or has ended; raises what a task raised."""
        while True:
            self._changed.clear()
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception() or AssertionError
            away = [sequence for sequence in self._running if sequence.is_away]
            if self._sampler.join_steps >= 0:
                if not any(sequence.due_step <= self._step for sequence in away):
                    return
            elif len(away) < len(self._running) or not away:
                return
            await self._changed.wait()

    def _release_closed(self) -> None:
        for sequence in [s for s in self._running if s.closed and s.due_step <= self._step]:
            last = max(self._running, key=lambda s: s.slot)
            if last is not sequence:
                self._cache.move(last.slot, sequence.slot)
                last.slot = sequence.slot
            self._running.remove(sequence)

    def _decode(self, parts: Sequence[Part]) -> list[_Sampled]:
        """One packed forward pass: a next token behind each part, and its log-prob."""
        policy, cache = self._sampler.policy, self._cache
        copied = [(part.copied_from, part) for part in parts if part.copied_from is not None]
        if copied:
            cache.copy(
                [source for source, _ in copied],
                [part.sequence.slot for _, part in copied],
                num_tokens=max(part.num_cached for _, part in copied),
            )
        cache.begin_step(
            [part.sequence.slot for part in parts],
            new_lengths=[len(part.token_ids) for part in parts],
            lengths=[part.length for part in parts],
            device=policy.device,
        )
        input_ids = cache.on_device([token for part in parts for token in part.token_ids])
        logits = policy.extend(input_ids, cache)
        uniforms = cache.on_device([float(part.sequence.uniforms[part.length]) for part in parts])
        tokens, logprobs = sample_tokens(logits, uniforms, temperature=self._temperature)
        # one copy to the host, so that it waits for the device once a step
        found = torch.stack([tokens.double(), logprobs.double(), logits.amax(dim=-1).double()]).tolist()
        # a greatest logit of NaN or infinity leaves no distribution to draw from
        if not all(map(math.isfinite, found[2])):
            raise FloatingPointError(f"the policy's logits are NaN or infinite at decoding step {self._step}")
        return [_Sampled(int(token), logprob) for token, logprob in zip(found[0], found[1], strict=True)]

    def _append(self, parts: Sequence[Part], sampled: Sequence[_Sampled]) -> None:
        self._step += 1
        for part, (token, logprob) in zip(parts, sampled, strict=True):
            sequence = part.sequence
            sequence.pending = sequence.pending[len(part.token_ids) :]
            # behind the first part of a prompt comes the rest of it
            if sequence.pending:
                continue
            sequence.append(token, logprob)
            is_stop = token in self._sampler.stop_ids
            if is_stop or len(sequence.token_ids) == sequence.max_new_tokens:
                sequence.due_step = self._step + max(self._sampler.join_steps, 0)
                sequence.finish(
                    Completion(sequence.token_ids, sequence.logprobs, is_stop, policy_version=self._sampler.version)
                )
