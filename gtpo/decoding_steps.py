"""What each sequence of a `LocalSampler` does in a decoding step, decided from step numbers and lengths alone.

A sequence with one new token always takes part. Prompts and tool output share a budget of tokens, first come first
served: what is left over of a long one goes on in the next steps. Sequences that begin with the same prompt wait while
one of them computes it, then take its keys and values and compute only the prompt's last token themselves.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gtpo.sampler import Completion


@dataclass(eq=False)
class LocalSequence:
    """A sequence of a run. `length` counts all its tokens; the last `pending` of them have no keys and values yet."""

    number: int
    uniforms: np.ndarray
    changed: asyncio.Event
    slot: int = -1
    length: int = 0
    prompt: tuple[int, ...] = ()
    pending: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    max_new_tokens: int = 0
    due_step: int = 0
    closed: bool = False
    _done: asyncio.Future[Completion] | None = None

    @property
    def is_away(self) -> bool:
        """True while the caller, not the sampler, has the next move."""
        return self._done is None and not self.closed

    @property
    def wants_tokens(self) -> bool:
        return self._done is not None and not self.closed

    @property
    def num_cached(self) -> int:
        """Of its tokens, how many have keys and values in the cache."""
        return self.length - len(self.pending)

    @property
    def is_new(self) -> bool:
        return self.wants_tokens and self.num_cached == 0

    @property
    def has_prompt_cached(self) -> bool:
        """Whether others of the same prompt can take its keys and values: all but those of the last token."""
        return 0 < len(self.prompt) - 1 <= self.num_cached

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
        if not self.length:
            self.prompt = tuple(new_ids)
        self.pending = [*self.pending, *new_ids]
        self.length += len(new_ids)
        self.max_new_tokens = max_new_tokens
        self.token_ids, self.logprobs = [], []
        self._done = asyncio.get_running_loop().create_future()
        self.changed.set()
        return await self._done

    def append(self, token: int, logprob: float) -> None:
        """A sampled token, which the next step computes keys and values of."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.pending = [token]
        self.length += 1

    def finish(self, completion: Completion) -> None:
        assert self._done is not None
        done, self._done = self._done, None
        # the caller may have given up while the step was made
        if not done.done():
            done.set_result(completion)


class Part(NamedTuple):
    """What a sequence does in one step: `token_ids`, the first of its pending ones, go behind `num_cached` tokens.

    copied_from: the slot from which the keys and values of those are copied first; None where the sequence has them.
    """

    sequence: LocalSequence
    token_ids: list[int]
    num_cached: int
    copied_from: int | None = None

    @property
    def length(self) -> int:
        """Of the sequence after the step, tokens that are still pending left out."""
        return self.num_cached + len(self.token_ids)


def plan_step(running: Sequence[LocalSequence], *, step: int, budget: int) -> list[Part]:
    """The parts of this step; empty only where no sequence that is due wants tokens.

    budget: of all parts of more than one token together, and of first tokens.
    """
    parts: list[Part] = []
    ready = [sequence for sequence in running if sequence.wants_tokens and sequence.due_step <= step]
    sources: dict[tuple[int, ...], LocalSequence] = {}
    if any(sequence.is_new for sequence in ready):
        for sequence in running:
            if sequence.has_prompt_cached:
                sources.setdefault(sequence.prompt, sequence)
    filling: list[LocalSequence] = []
    for sequence in ready:
        if sequence.is_new and sequence.prompt in sources:
            source = sources[sequence.prompt]
            sequence.pending = sequence.pending[-1:]
            parts.append(Part(sequence, sequence.pending, sequence.num_cached, copied_from=source.slot))
        elif len(sequence.pending) == 1 and sequence.num_cached:
            parts.append(Part(sequence, sequence.pending, sequence.num_cached))
        else:
            filling.append(sequence)
    begun = {sequence.prompt for sequence in filling if 0 < sequence.num_cached < len(sequence.prompt) - 1}
    for sequence in sorted(filling, key=lambda sequence: (sequence.due_step, sequence.number)):
        if sequence.is_new and sequence.prompt in begun:
            continue
        if sequence.is_new and len(sequence.prompt) > 1:
            begun.add(sequence.prompt)
        if budget > 0:
            parts.append(Part(sequence, sequence.pending[:budget], sequence.num_cached))
            budget -= len(parts[-1].token_ids)
    return parts
