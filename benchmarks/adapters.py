"""`make bench-adapters`: advantages through each adapter beside the trainers' own, and a step of TRL with our loss.

The first table computes GRPO, the one credit that all of them know: 4,096 trajectories of 8 turns, one reward at the
end.  The floor writes the result once.  "restated from" are the trainers' own lines, written down again where they
cannot be called alone; AReaL, prime-rl and tinker-cookbook take the "lists" row, turn by turn.

The second table is forward and backward of TRL's loss, by `GRPOTrainer` and by `GTPOTrainer`.  The floor is forward
and backward of the model without its head.  TRL 1.16 has no Liger loss: `use_liger_kernel=True` exchanges layers of
the model for Triton kernels, which need a GPU.
"""

import warnings
from collections.abc import Sequence

import torch

from benchmarks.adapter_credit import GROUP_SIZE, measure_credit
from benchmarks.measure import parse_arguments, publish, smoke_run
from benchmarks.trl_step import FULL_STEP, SMOKE_STEP, judge_step, measure_step

CAPTION = """Advantages of 8 turns through each adapter, beside the trainers' own code; then a step of TRL.
CPU ms: of all threads; medians of interleaved rounds.  extra MiB: peak above what was held before, outputs included.
errors: relative to float64 (advantages; loss, gradient of the head, of the embeddings).  x floor: see the module."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(__doc__, arguments)
    with smoke_run(options.smoke), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        if options.smoke:
            rows = measure_credit(2 * GROUP_SIZE, 2, rounds=1) + measure_step(SMOKE_STEP, rounds=1)
        else:
            rows = measure_credit(4096, 16, rounds=11)
            steps = measure_step(FULL_STEP, rounds=11)
            judge_step(steps)
            rows += steps
    publish("bench-adapters", f"{CAPTION}  Threads: {torch.get_num_threads()}.", rows, options.results)


if __name__ == "__main__":
    main()
