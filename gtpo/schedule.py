"""What happens when, as pure functions of the step: learning rate, order of tasks, split of a rollout into updates."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")


def learning_rate(
    step: int, *, total: int, base: float, warmup: int, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """Rate of step `step`, counted from 0: a linear rise over `warmup` steps, then the schedule down to 0 at `total`.

    >>> [learning_rate(s, total=4, base=1.0, warmup=2, schedule="linear") for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    progress = (step - warmup) / max(total - warmup, 1)
    return base * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def epoch_order(num_tasks: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the tasks: a permutation that depends on (seed, epoch) only."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(num_tasks).tolist()
    return order


def places_of_step(step: int, size: int, count: int, *, seed: int) -> list[int]:
    """Which of `count` tasks step `step` takes: the next `size` in a seeded order, epoch after epoch.

    A function of the step alone.

    >>> sorted(places_of_step(0, 2, 4, seed=0) + places_of_step(1, 2, 4, seed=0))
    [0, 1, 2, 3]
    """
    places = range(step * size, (step + 1) * size)
    orders = {epoch: epoch_order(count, seed=seed, epoch=epoch) for epoch in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]


def split_evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """At most `parts` runs of neighbours, none empty, sizes differing by at most one.

    >>> split_evenly([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4, 5]]
    """
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in itertools.pairwise(bounds) if end > start]
