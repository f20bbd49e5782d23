"""Retry family: the error message of a failed call says how to go on.

Each item lies behind one of several getters; which one is random and not in the prompt. A wrong getter raises an error
that names the right one, so an item costs at most two calls to who reads it and up to `num_getters` to who does not.
The right one returns all values collected so far, so that the last output is the answer.
The demonstrator does not read it: a model that copies it runs out of turns on a part of the tasks, and reinforcement
learning has to find the reading.
"""

import random
from typing import Any

from gtpo.environments.base import DEMO_SYSTEM_PROMPT, Answer, Call, Demonstration, GeneratedEnvironment
from gtpo.environments.code import CodeEnvironment
from gtpo.types import Task

ITEMS = (
    *("axe", "bag", "bell", "cap", "coin", "cup", "fan", "hat", "jar", "key"),
    *("lamp", "map", "mug", "net", "pen", "pin", "rope", "rug", "saw", "toy"),
)

# The table lives in a closure: a model that prints a global does not get around the getters.
_SETUP = """\
def _make_getters(places, values, getters):
    used = set()
    collected = {{}}
    def make(getter):
        def get(item):
            if __cell__ in used:
                raise RuntimeError("one box call a cell")
            used.add(__cell__)
            if item not in places:
                raise LookupError(f"no item {{item}}")
            if places[item] != getter:
                raise LookupError(f"{{item}} is in {{places[item]}}")
            collected[item] = str(values[item])
            return " ".join(collected.values())
        return get
    return [make(getter) for getter in getters]
{targets}, = _make_getters({places!r}, {values!r}, {getters!r})
del _make_getters
"""


class RetryEnvironment(GeneratedEnvironment, CodeEnvironment):
    """Collect `num_items` values, one getter call a cell, and answer them in order, joined by spaces.

    num_items: items a task, 1 to 20. num_getters: getters `box_a`, `box_b`, ... that all items share, 2 to 26.
    num_digits: digits of a value, 1 to 4; there must be as many values as items.
    Raises ValueError for values outside these.

    >>> task = RetryEnvironment().tasks("eval", 1, seed=0)[0]
    >>> task.prompt, task.answer, task.data["places"]
    ('get net, cap', '67 56', ['box_a', 'box_a'])
    """

    name = "retry"
    system_prompt = DEMO_SYSTEM_PROMPT
    explain_protocol = False

    def __init__(self, num_items: int = 2, num_getters: int = 4, num_digits: int = 2) -> None:
        if not 1 <= num_items <= len(ITEMS):
            raise ValueError(f"num_items must be from 1 to {len(ITEMS)}, got {num_items}")
        if not 2 <= num_getters <= 26:
            raise ValueError(f"num_getters must be from 2 to 26, got {num_getters}")
        if not 1 <= num_digits <= 4 or num_items > 9 * 10 ** (num_digits - 1):
            raise ValueError(
                f"num_digits must be from 1 to 4, with a value for each of {num_items} items, got {num_digits}"
            )
        self._num_items = num_items
        self._values = range(10 ** (num_digits - 1), 10**num_digits)
        self._getters = [f"box_{chr(ord('a') + index)}" for index in range(num_getters)]

    def draw(self, rng: random.Random, position: int) -> tuple[str, str, dict[str, Any]]:
        items = rng.sample(ITEMS, self._num_items)
        places = [rng.choice(self._getters) for _ in items]
        # distinct, so that an answer in the wrong order is never right
        values = rng.sample(self._values, self._num_items)
        data = {"items": items, "places": places, "values": values, "getters": list(self._getters)}
        return f"get {', '.join(items)}", " ".join(map(str, values)), data

    def setup_code(self, task: Task) -> str:
        items, getters = task.data["items"], list(task.data["getters"])
        places = dict(zip(items, task.data["places"], strict=True))
        values = dict(zip(items, task.data["values"], strict=True))
        return _SETUP.format(targets=", ".join(getters), places=places, values=values, getters=getters)

    def grade(self, task: Task, answer: str | None) -> float:
        return float(answer is not None and answer.split() == task.answer.split())

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        collected = ""
        for item in task.data["items"]:
            getters = list(task.data["getters"])
            rng.shuffle(getters)
            for getter in getters:
                output = yield Call(f"print({getter}('{item}'))")
                if output[:1].isdigit():
                    collected = output.strip()
                    break
        yield Answer(collected)

    def expected_output(self, task: Task, code: str, output: str) -> bool | None:
        """True where the output is made of wanted values, None where nothing was printed."""
        if output.strip() in ("", "(no output)"):
            return None
        return set(output.split()) <= {str(value) for value in task.data["values"]}
