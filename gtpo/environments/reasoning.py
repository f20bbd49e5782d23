"""Tasks of the reasoning-gym library, whose questions have to be read piece by piece with a tool.

The prompt names the operation only. `read(1)`, `read(2)`, ... hand out the question's parts, one a cell, so that a task
needs at least as many calls as it has parts; Python computes, and reasoning-gym grades the answer.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtpo.environments.base import DEMO_SYSTEM_PROMPT, Answer, Call, Demonstration, GeneratedEnvironment
from gtpo.environments.code import CodeEnvironment
from gtpo.types import Task

# The parts live in a closure: a model that prints a global does not get around read().
_SETUP = """\
from math import gcd, lcm
def base(number, source, target):
    rest, digits = int(str(number), source), ""
    while rest:
        rest, digit = divmod(rest, target)
        digits = "0123456789abcdef"[digit] + digits
    return digits or "0"
def _make_read(parts):
    used = set()
    def read(number):
        if __cell__ in used:
            raise RuntimeError("one read a cell")
        used.add(__cell__)
        if number not in range(1, len(parts) + 1):
            raise LookupError(f"no part {{number}}")
        return parts[number - 1]
    return read
read = _make_read({parts!r})
del _make_read
"""

_PURE_READ = re.compile(r"\s*print\(\s*read\(\s*(\d{1,2})\s*\)\s*\)\s*")


@dataclass(frozen=True)
class _Recipe:
    """How one reasoning-gym generator becomes a family of tasks.

    config: its small configuration. operation: how the prompt calls it. parts: what read() hands out, from the entry's
    metadata. compute: the demonstrator's last call, with one {} a part, filled with what read() printed.
    """

    config: Mapping[str, Any]
    operation: str
    parts: Callable[[Mapping[str, Any]], list[int | str]]
    compute: str


def _numbers(metadata: Mapping[str, Any]) -> list[int | str]:
    return list(metadata["numbers"])


def _signed_terms(metadata: Mapping[str, Any]) -> list[int | str]:
    """The terms of a sum, each with the sign before it: "57 - 8 + 9" is 57, -8, 9."""
    return [int(term) for term in re.findall(r"-?\d+", metadata["expression"].replace(" ", ""))]


def _factors(metadata: Mapping[str, Any]) -> list[int | str]:
    return [int(factor) for factor in metadata["expression"].split("*")]


def _bases(metadata: Mapping[str, Any]) -> list[int | str]:
    return [metadata["source_repr"], metadata["source_base"], metadata["target_base"]]


_RECIPES = {
    "chain_sum": _Recipe(
        config={"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2},
        operation="sum",
        parts=_signed_terms,
        compute="print({}+{}+{})",
    ),
    "products": _Recipe(
        config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        operation="product",
        parts=_factors,
        compute="print({}*{})",
    ),
    "lcm": _Recipe(
        config={"min_value": 2, "max_value": 99},
        operation="lcm",
        parts=_numbers,
        compute="print(lcm({},{}))",
    ),
    "gcd": _Recipe(
        config={"min_value": 2, "max_value": 999},
        operation="gcd",
        parts=_numbers,
        compute="print(gcd({},{}))",
    ),
    "base_conversion": _Recipe(
        config={"min_value": 10, "max_value": 999},
        operation="base",
        parts=_bases,
        compute="print(base('{}',{},{}))",
    ),
}


class ReasoningGymEnvironment(GeneratedEnvironment, CodeEnvironment):
    """Tasks of the generators `datasets`, in turn.

    datasets: names among chain_sum, products, lcm, gcd, base_conversion. Many of gcd's answers are 1 or 2, which can be
    guessed without a call; those of the others cannot.
    Raises ValueError for an unknown name or none, ImportError without the package reasoning-gym.

    >>> task = ReasoningGymEnvironment(["lcm"]).tasks("train", 1, seed=0)[0]
    >>> task.prompt, task.data["parts"], task.answer
    ('lcm of read(1), read(2)', [15, 27], '135')
    """

    name = "reasoning_gym"
    system_prompt = DEMO_SYSTEM_PROMPT
    explain_protocol = False

    def __init__(self, datasets: Sequence[str] = ("chain_sum", "lcm")) -> None:
        unknown = [name for name in datasets if name not in _RECIPES]
        if not datasets or unknown or isinstance(datasets, str):
            raise ValueError(f"datasets must be a list of names among {', '.join(_RECIPES)}, got {datasets!r}")
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise ImportError("environment 'reasoning_gym' needs the package: pip install reasoning-gym") from error
        # an item depends on seed + index only, so one data set of seed 0 holds all of them
        self._generators = {name: create_dataset(name, seed=0, **_RECIPES[name].config) for name in datasets}

    def draw(self, rng: random.Random, position: int) -> tuple[str, str, dict[str, Any]]:
        dataset = list(self._generators)[position % len(self._generators)]
        entry = self._generators[dataset][rng.getrandbits(31)]
        parts = _RECIPES[dataset].parts(entry["metadata"])
        reads = ", ".join(f"read({number})" for number in range(1, len(parts) + 1))
        data = {"dataset": dataset, "question": entry["question"], "parts": parts}
        return f"{_RECIPES[dataset].operation} of {reads}", entry["answer"], data

    def setup_code(self, task: Task) -> str:
        return _SETUP.format(parts=list(task.data["parts"]))

    def grade(self, task: Task, answer: str | None) -> float:
        """1.0 where reasoning-gym's own scorer gives full marks, else 0.0."""
        if answer is None:
            return 0.0
        entry = {"question": task.data["question"], "answer": task.answer, "metadata": {}}
        return float(self._generators[task.data["dataset"]].score_answer(answer.strip(), entry) == 1.0)

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        recipe = _RECIPES[task.data["dataset"]]
        parts = []
        for number in range(1, recipe.compute.count("{}") + 1):
            output = yield Call(f"print(read({number}))")
            parts.append(output.strip())
        output = yield Call(recipe.compute.format(*parts))
        yield Answer(output.strip())

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        """Checks a plain `print(read(i))` against part i, and what is printed without a read against the answer."""
        if output.strip() in ("", "(no output)"):
            return None
        if read := _PURE_READ.fullmatch(code):
            parts = task.data["parts"]
            number = int(read[1])
            return number in range(1, len(parts) + 1) and output.strip() == str(parts[number - 1])
        if output.strip() == task.answer:
            return True
        return None if "read(" in code else False
