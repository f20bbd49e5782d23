"""`make bench-adapters`: advantages through each adapter beside the trainers' own, by the one credit all know: GRPO.

4,096 trajectories of 8 turns, one reward at the end.  In .venv-adapters, where verl, SkyRL, OpenRLHF, AReaL and
tinker-cookbook are: their functions are called.  "restated from" are the lines of the others, written down again.
The floor writes the result once.  The same target then measures a step of TRL: `benchmarks/trl_step.py`.
"""

import warnings
from collections.abc import Sequence

import torch

from benchmarks.adapter_credit import measure_credit
from benchmarks.credit import GROUP_SIZE
from benchmarks.measure import parse_arguments, publish, smoke_run

CAPTION = """Advantages of trajectories of 8 turns through each adapter, after the code of the trainer itself.
CPU ms: of all threads; medians of interleaved rounds.  extra MiB: peak above what was held before, outputs included.
errors: relative to float64.  x floor: see the module."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own
        rows = measure_credit(2 * GROUP_SIZE, 2, rounds=1) if options.smoke else measure_credit(4096, 16, rounds=11)
    publish("bench-adapters", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
