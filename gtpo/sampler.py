"""Sampling with continuous batching: many sequences, each extended, sampled and extended again, with no turn barrier.

Every decoding step is one packed forward pass over the sequences that have something to do: one sampled token each, or
a whole prompt or tool output. Each sequence draws from its own stream of uniforms, one a token, by inverting the
cumulative distribution: what it samples does not depend on which others run beside it (up to floating-point rounding).
The order of events is a function of step numbers alone (see `RolloutConfig.tool_join_steps`), so a run repeats bit for
bit. The model runs in a thread of its own, so that tools get on while it does.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gtpo.attention import SlotCache
from gtpo.policy import Policy

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """Sampled ids and their log-probs after temperature. `finished` is False when the token budget ran out first."""

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class SampledSequence:
    """A sequence in the sampler. `number` is its place in the batch; `length` counts its tokens, pending ones too."""

    number: int
    uniforms: np.ndarray
    slot: int = -1
    length: int = 0
    pending: list[int] = field(default_factory=list)
    completion: Completion | None = None
    max_new_tokens: int = 0
    due_step: int = 0
    closed: bool = False
    _done: asyncio.Future[Completion] | None = None
    _changed: asyncio.Event | None = None

    @property
    def is_away(self) -> bool:
        """True while the caller, not the sampler, has the next move."""
        return self._done is None and not self.closed

    @property
    def wants_tokens(self) -> bool:
        return self._done is not None

    async def sample(self, new_ids: Sequence[int], *, max_new_tokens: int) -> Completion:
        """Appends `new_ids` (a prompt, or tool output) and samples a completion of at least one token."""
        if not new_ids and not self.pending:
            raise ValueError("new_ids must hold at least one token for a new sequence, got none")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        capacity = len(self.uniforms) - 1
        if self.length + len(new_ids) + max_new_tokens > capacity:
            raise ValueError(
                f"a sequence must fit the sampler's max_tokens = {capacity}, got {self.length} tokens so far, "
                f"{len(new_ids)} new ones and max_new_tokens = {max_new_tokens}"
            )
        assert self._changed is not None
        self.pending += new_ids
        self.length += len(new_ids)
        self.max_new_tokens = max_new_tokens
        self.completion = Completion([], [], finished=False)
        self._done = asyncio.get_running_loop().create_future()
        self._changed.set()
        return await self._done


class Sampler:
    """Runs `num_slots` sequences of at most `max_tokens` tokens at a time on one policy."""

    def __init__(
        self,
        policy: Policy,
        *,
        num_slots: int,
        max_tokens: int,
        temperature: float,
        stop_ids: Collection[int],
        join_steps: int,
    ) -> None:
        if max_tokens > policy.max_tokens:
            raise ValueError(f"max_tokens must be at most the policy's {policy.max_tokens}, got {max_tokens}")
        self.policy = policy
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.stop_ids = frozenset(stop_ids)
        self.join_steps = join_steps
        self.num_sampled_tokens = 0

    async def run(
        self,
        start: Callable[[SampledSequence], Awaitable[T]],
        *,
        seeds: Sequence[Sequence[int]],
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """Runs `start(sequence)` for one sequence a seed, as slots come free, and returns the results in order.

        Raises what a `start` raised, after the others were cancelled.
        """
        self._changed = asyncio.Event()
        self._cache = SlotCache(self.num_slots, self.max_tokens)
        self._step = 0
        waiting = [
            SampledSequence(i, _uniforms(seed, self.max_tokens), _changed=self._changed) for i, seed in enumerate(seeds)
        ]
        waiting.reverse()
        self._running: list[SampledSequence] = []
        tasks: list[asyncio.Task[T]] = []
        loop, decoder = asyncio.get_running_loop(), ThreadPoolExecutor(max_workers=1)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.num_slots:
                    sequence = waiting.pop()
                    sequence.slot = len(self._running)
                    sequence.due_step = self._step
                    self._running.append(sequence)
                    tasks.append(asyncio.create_task(self._drive(start, sequence, on_finished)))
                await self._settle(tasks)
                self._release_closed()
                ready = [
                    sequence for sequence in self._running if sequence.wants_tokens and sequence.due_step <= self._step
                ]
                if ready:
                    # nothing that the thread reads of these sequences changes before it has ended
                    self._append(ready, await loop.run_in_executor(decoder, self._decode, ready))
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

    async def _drive(
        self,
        start: Callable[[SampledSequence], Awaitable[T]],
        sequence: SampledSequence,
        on_finished: Callable[[], None],
    ) -> T:
        try:
            return await start(sequence)
        finally:
            sequence.closed = True
            self._changed.set()
            on_finished()

    async def _settle(self, tasks: list[asyncio.Task[T]]) -> None:
        """Waits until every sequence that is due has asked for more or has ended; raises what a task raised."""
        while True:
            self._changed.clear()
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception() or AssertionError
            away = [sequence for sequence in self._running if sequence.is_away]
            if self.join_steps >= 0:
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

    def _decode(self, ready: list[SampledSequence]) -> list[tuple[int, float]]:
        """One packed forward pass: the next token of each ready sequence, and its log-prob."""
        device = self.policy.device
        self._cache.begin_step(
            [sequence.slot for sequence in ready],
            new_lengths=[len(sequence.pending) for sequence in ready],
            lengths=[sequence.length for sequence in ready],
            device=device,
        )
        input_ids = torch.tensor([token for sequence in ready for token in sequence.pending], device=device)
        logits = self.policy.extend(input_ids, self._cache)
        uniforms = torch.tensor([sequence.uniforms[sequence.length] for sequence in ready], device=device)
        tokens, logprobs = sample_tokens(logits, uniforms, temperature=self.temperature)
        # one copy to the host, so that it waits for the device once a step
        found = torch.stack([tokens.double(), logprobs.double(), logits.amax(dim=-1).double()]).tolist()
        # a greatest logit of NaN or infinity leaves no distribution to draw from
        if not all(map(math.isfinite, found[2])):
            raise FloatingPointError(f"the policy's logits are NaN or infinite at decoding step {self._step}")
        return [(int(token), logprob) for token, logprob in zip(found[0], found[1], strict=True)]

    def _append(self, ready: list[SampledSequence], sampled: list[tuple[int, float]]) -> None:
        self._step += 1
        self.num_sampled_tokens += len(ready)
        for sequence, (token, logprob) in zip(ready, sampled, strict=True):
            completion = sequence.completion
            assert completion is not None
            completion.token_ids.append(token)
            completion.logprobs.append(logprob)
            sequence.pending = [token]
            sequence.length += 1
            if token in self.stop_ids or len(completion.token_ids) == sequence.max_new_tokens:
                self._finish(sequence, finished=token in self.stop_ids)

    def _finish(self, sequence: SampledSequence, *, finished: bool) -> None:
        assert sequence.completion is not None and sequence._done is not None
        done, sequence._done = sequence._done, None
        sequence.due_step = self._step + max(self.join_steps, 0)
        done.set_result(Completion(sequence.completion.token_ids, sequence.completion.logprobs, finished))


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: token i is the first whose cumulative probability exceeds u_i, in float64.

    logits: [B, V].  uniforms: [B] float64 in [0, 1).  Returns (token ids [B], their log-probs [B] float32).

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(2, 3)
    >>> sample_tokens(logits, torch.tensor([0.2, 0.7]).double(), temperature=1.0)[0]
    tensor([0, 1])
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # strictly below the total: tokens of probability 0 behind the last possible one must stay out of reach
    thresholds = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # of a row of NaN the search finds the place behind the last token
    tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _uniforms(seed: Sequence[int], num: int) -> np.ndarray:
    """The stream of one sequence: entry t decides the token at position t."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(num + 1)
