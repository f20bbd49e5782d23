"""What `benchmarks.bias` studies, and what it finds: cases and records, which its report reads too."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bias_processes import PROCESSES
from gtpo.methods import METHODS, CreditSum, Method

RESULTS = Path(__file__).parent / "results" / "bias.json"
GROUPS_A_BATCH, GROUP_SIZE = 4, 8
GROUP_SIZES = (4, 8, 16, 32)
# one in a thousand, so that a table of a hundred cells has seldom a wrong verdict
QUANTILE_Z = 3.090


def by_itself(credit: CreditSum) -> Method:
    """A credit in the loss that leaves it as it is: the sum over a trajectory's tokens, REINFORCE."""
    return dataclasses.replace(METHODS["rloo"], credit=credit)


def changed(name: str, number: int, **changes: object) -> Method:
    """The credit of a preset with a term changed, by itself."""
    terms = list(METHODS[name].credit.terms)
    terms[number] = dataclasses.replace(terms[number], **changes)  # type: ignore[arg-type]
    return by_itself(dataclasses.replace(METHODS[name].credit, terms=tuple(terms)))


# credits by themselves: those that differ, and three that no preset has
CREDITS: dict[str, Method] = {
    **{
        name: by_itself(METHODS[name].credit)
        for name in (
            "gtpo",
            "grpo",
            "dr_grpo",
            "rloo",
            "turn_rloo",
            "reinforce_pp",
            "mt_grpo",
            "matchtir",
            "gigpo",
            "igpo",
        )
    },
    "gtpo, gamma 1": changed("gtpo", 0, gamma=1.0),
    "igpo by turn": changed("igpo", 0, scope="group_turn"),
    "mt_grpo, among calls": changed("mt_grpo", 1, others="leave"),
}
# those on which a loss makes no other difference than the number of turns; of the others the credits see nothing new
TURN_PROCESSES = [
    process for process in PROCESSES if process.name in ("search", "two tasks", "paid calls", "luck", "loan")
]
BY_SIZE = ("gtpo", "gtpo, gamma 1", "grpo", "rloo", "turn_rloo", "igpo", "igpo by turn")


@dataclass(frozen=True)
class Finding:
    """Of one method on one process.

    bias: the part of the expected update that does not point along the gradient, in parts of the one that does; where
    there is no gradient, the whole expected update in standard deviations of one batch's. bias_error: half its 95 %
    interval. is_biased: it is not 0, or points against the gradient, by a test at one in a thousand.
    signal: the part along the gradient, in those deviations; without a gradient None, as all that follows but the last.
    size, size_error: expected update along the gradient over the gradient's length, and half its 95 % interval.
    variance, variance_error: of an update scaled to a size of 1, over that of `exact_updates`.
    drift: the expected change of all logits together, in those deviations.
    """

    process: str
    method: str
    group_size: int
    num_batches: int
    bias: float
    bias_error: float
    is_biased: bool
    signal: float | None
    size: float | None
    size_error: float | None
    variance: float | None
    variance_error: float | None
    drift: float

    @property
    def is_found(self) -> bool:
        """Whether there is a part along the gradient at all, by a test at one in a thousand."""
        return self.signal is not None and abs(self.signal) * math.sqrt(self.num_batches) > QUANTILE_Z

    @property
    def angle(self) -> tuple[float, float]:
        """Between expected update and gradient, in degrees, and half its interval; above 90 it points against it."""
        assert self.signal is not None
        along = math.copysign(1.0, self.signal)
        return math.degrees(math.atan2(self.bias, along)), math.degrees(self.bias_error / (1.0 + self.bias**2))

    @property
    def cosine(self) -> tuple[float, float, float]:
        """Between expected update and gradient, and the ends of its interval."""
        angle, error = self.angle
        most, least = min(angle + error, 180.0), max(angle - error, 0.0)
        return tuple(math.cos(math.radians(x)) for x in (angle, most, least))  # type: ignore[return-value]

    @property
    def signed_bias(self) -> tuple[float, float]:
        """Where there is no gradient: the expected update, below 0 where logits fall; half its interval."""
        return math.copysign(self.bias, self.drift), self.bias_error


@dataclass(frozen=True)
class Results:
    """What `make bias` finds: presets in their own loss on all processes; credits by themselves on `TURN_PROCESSES`."""

    presets: list[Finding]
    credits: list[Finding]
    credits_by_size: list[Finding]

    def as_json(self) -> str:
        """A line a finding.

        >>> results = Results([], [], [])
        >>> Results.from_json(results.as_json()) == results
        True
        """
        parts = (
            f'"{field.name}": [\n' + ",\n".join(json.dumps(vars(found)) for found in getattr(self, field.name)) + "\n]"
            for field in dataclasses.fields(self)
        )
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        return cls(**{name: [Finding(**found) for found in part] for name, part in json.loads(text).items()})
