"""An environment of your own: find an item on one of six shelves and say the number on it.

`look` is the only tool. A look at the wrong shelf says which one is right, so two calls are enough for who reads that.
"""

import random
from typing import Any

from gtpo import Answer, Demonstration, FunctionEpisode, GeneratedEnvironment, Grade, RunTools, Task, Trajectory, Use

ITEMS = ("axe", "bell", "cap", "coin", "fan", "hat", "key", "lamp", "map", "mug", "pen", "rope")
SHELVES = "abcdef"


class Warehouse(FunctionEpisode):
    """The world of one attempt: what `task.data` says, and what was looked at so far."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.prompt, system="Call look in python. Then answer.", functions=[self.look])
        self.shelf, self.number = task.data["shelf"], task.answer
        self.looks = 0

    def look(self, shelf: str) -> str:
        """Looks at a shelf.

        Args:
            shelf: One of a to f.
        """
        self.looks += 1
        if shelf != self.shelf:
            raise LookupError(f"it is on {self.shelf}")
        self.reward("found", 0.1)  # a named term of this turn; [[rewards]] can weigh it
        return self.number

    def grade(self, trajectory: Trajectory) -> Grade:
        return Grade(float(trajectory.answer == self.number), measures={"looks": self.looks})


class WarehouseEnvironment(GeneratedEnvironment):
    """Draws tasks; ids and the held-out split come from `GeneratedEnvironment`."""

    name = "warehouse"
    explain_protocol = False  # a tiny model learns how to call from its demonstrations

    def draw(self, rng: random.Random, position: int) -> tuple[str, str, dict[str, Any]]:
        data = {"shelf": rng.choice(SHELVES), "nonce": rng.randrange(1000)}
        return f"find {rng.choice(ITEMS)}", str(rng.randrange(10, 100)), data

    def open(self, task: Task, *, sample: int, tools: RunTools) -> Warehouse:
        return Warehouse(task)

    def oracle(self, task: Task, rng: random.Random) -> Demonstration:
        """Looks everywhere in a random order: to read the hint is left to reinforcement learning."""
        for shelf in rng.sample(SHELVES, len(SHELVES)):
            output = yield Use("look", {"shelf": shelf})
            if output.isdigit():
                yield Answer(output)
