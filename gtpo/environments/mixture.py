"""Several environments as one."""

import random
from collections.abc import Sequence

from gtpo.environments.base import Demonstration, Environment, Split, check_request
from gtpo.environments.programs import ProgramCase
from gtpo.types import Task


class Mixture(Environment):
    """Tasks of several environments in the proportions of `weights`, interleaved; each is served by its own one.

    Raises ValueError unless there is one positive weight for each environment, names are unique, and all environments
    have the same system prompt.

    >>> from gtpo.environments.retry import RetryEnvironment
    >>> mixture = Mixture([RetryEnvironment()], weights=[1.0])
    >>> [task.id for task in mixture.tasks("eval", 2, seed=3)]
    ['retry-eval-3-0', 'retry-eval-3-1']
    """

    name = "mixture"

    def __init__(self, environments: Sequence[Environment], weights: Sequence[float]) -> None:
        if not environments:
            raise ValueError("environments must hold at least one environment, got none")
        if len(weights) != len(environments) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be {len(environments)} positive numbers, got {list(weights)}")
        names = [environment.name for environment in environments]
        if len(set(names)) != len(names):
            raise ValueError(f"environments must have different names, got {', '.join(names)}")
        prompts = {environment.system_prompt for environment in environments}
        if len(prompts) != 1:
            raise ValueError(f"environments must share one system prompt, got {sorted(prompts)}")
        self.system_prompt = prompts.pop()
        # the prompt is one for all, so what one of them leaves out is added for all
        self.explain_protocol = any(environment.explain_protocol for environment in environments)
        self._environments = dict(zip(names, environments, strict=True))
        self._weights = dict(zip(names, (weight / sum(weights) for weight in weights), strict=True))

    def tasks(self, split: Split, num: int, seed: int) -> list[Task]:
        check_request(split, num)
        names = self._interleave(num)
        pools = {
            name: iter(environment.tasks(split, names.count(name), seed))
            for name, environment in self._environments.items()
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

    def setup_code(self, task: Task) -> str:
        return self._of(task).setup_code(task)

    def grade(self, task: Task, answer: str | None) -> float:
        return self._of(task).grade(task, answer)

    def program_cases(self, task: Task) -> Sequence[ProgramCase]:
        return self._of(task).program_cases(task)

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        return self._of(task).oracle(task, rng)

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        return self._of(task).expected_output(task, code, output)

    def _of(self, task: Task) -> Environment:
        if task.environment not in self._environments:
            raise ValueError(
                f"task.environment must be one of {', '.join(self._environments)}, got {task.environment!r}"
            )
        return self._environments[task.environment]
