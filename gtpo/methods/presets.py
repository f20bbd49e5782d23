"""The published methods by name: settings, source, and an example worked by hand, which is run as a doctest."""

import textwrap

from gtpo.methods.outcome_presets import OUTCOME_PRESETS
from gtpo.methods.preset import Preset
from gtpo.methods.records import Method
from gtpo.methods.turn_presets import TURN_PRESETS

PRESETS: dict[str, Preset] = {**TURN_PRESETS, **OUTCOME_PRESETS}
METHODS: dict[str, Method] = {name: preset.method for name, preset in PRESETS.items()}

# The two other methods called GTPO, which are no presets: what of them the credit covers.
NAMESAKES = {
    "GTPO and GRPO-S, arXiv 2508.04349": (
        "rewards shaped by entropy. GRPO-S: give the shaped reward of a sequence as its outcome, with "
        'a term of quantity = "outcome", population = "trajectories". GTPO gives every token a reward of its own: not '
        "covered."
    ),
    "GTPO, arXiv 2508.03772": (
        "its advantage is that of grpo. It also spares tokens that stand at one place in right and wrong completions, "
        "and leaves completions of high entropy out: not covered, these are masks for the loss."
    ),
}

_EXAMPLE = ">>> from gtpo.credit import group_advantages\n>>> credit = METHODS[{name!r}].credit\n"
__test__ = {name: _EXAMPLE.format(name=name) + textwrap.dedent(preset.notes) for name, preset in PRESETS.items()}
