"""What a rollout asks of a sampler: completions of many trajectories at once, by weights of a known version.

`LocalSampler` (`gtpo.local_sampler`) samples in this process, with the very weights that are trained. An engine over a
network is another implementation: it takes the new weights in `load`, and says with each completion which it used.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """Sampled ids and their log-probs after temperature. `finished` is False when the token budget ran out first.

    policy_version: number of training steps that the weights which sampled it had taken; None where no policy did.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    policy_version: int | None = None


class SampledSequence(Protocol):
    """One sequence of a run: ids are only ever appended. `number` is its place among the seeds."""

    number: int

    async def sample(self, new_ids: Sequence[int], *, max_new_tokens: int) -> Completion:
        """Appends `new_ids` (a prompt, or tool output) and samples a completion of at least one token."""
        ...


class Sampler(Protocol):
    """Samples for a whole run: made once, given new weights before each rollout, closed at the end."""

    async def run(
        self,
        play: Callable[[SampledSequence], Awaitable[T]],
        *,
        seeds: Sequence[Sequence[int]],
        temperature: float,
        on_finished: Callable[[], None],
    ) -> list[T]:
        """`play(sequence)` for one sequence a seed, many at a time; the results in the seeds' order.

        on_finished: called as each of them ends. Raises what a `play` raised, after the others were cancelled.
        """
        ...

    async def load(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """From now on samples with these weights, by name, and calls them `version`.

        Raises ValueError for weights that it cannot take.
        """
        ...

    async def close(self) -> None:
        """Gives back what the sampler holds. Closing twice is harmless."""
        ...
