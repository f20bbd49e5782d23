"""Several environments as one."""

import random
from collections.abc import Mapping, Sequence

from gtpo.environments.base import Demonstration, Environment, Split, check_request
from gtpo.environments.checked import checked_oracle, checked_tasks
from gtpo.environments.episode import BlockingEpisode, Episode
from gtpo.tools import RunTools
from gtpo.types import Task


class Mixture:
    """Tasks of several environments in the proportions of `weights`, interleaved; each is served by its own one.

    Raises ValueError unless there is one positive weight for each environment and names are unique.

    >>> from gtpo.environments.retry import RetryEnvironment
    >>> mixture = Mixture([RetryEnvironment()], weights=[1.0])
    >>> [task.id for task in mixture.tasks("eval", 2, seed=3)]
    ['retry-eval-3-0', 'retry-eval-3-1']
    """

    def __init__(self, environments: Sequence[Environment], weights: Sequence[float]) -> None:
        if not environments:
            raise ValueError("environments must hold at least one environment, got none")
        if len(weights) != len(environments) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be {len(environments)} positive numbers, got {list(weights)}")
        names = [environment.name for environment in environments]
        if len(set(names)) != len(names):
            raise ValueError(f"environments must have different names, got {', '.join(names)}")
        self.by_name: Mapping[str, Environment] = dict(zip(names, environments, strict=True))
        self._weights = dict(zip(names, (weight / sum(weights) for weight in weights), strict=True))

    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        check_request(split, num)
        names = self._interleave(num)
        pools = {
            name: iter(checked_tasks(environment, split, names.count(name), seed))
            for name, environment in self.by_name.items()
        }
        return [next(pools[name]) for name in names]

    def _interleave(self, num: int) -> list[str]:
        """The environment of each position: always the one that lags furthest behind its share."""
        counts = dict.fromkeys(self._weights, 0)
        names = []
        for position in range(1, num + 1):
            name = max(counts, key=lambda name: self._weights[name] * position - counts[name])
            counts[name] += 1
            names.append(name)
        return names

    def of(self, task: Task) -> Environment:
        """The environment that `task` is of."""
        if task.environment not in self.by_name:
            raise ValueError(f"task.environment must be one of {', '.join(self.by_name)}, got {task.environment!r}")
        return self.by_name[task.environment]

    def open(self, task: Task, *, sample: int, tools: RunTools) -> Episode | BlockingEpisode:
        return self.of(task).open(task, sample=sample, tools=tools)

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        return checked_oracle(self.of(task), task, rng)
