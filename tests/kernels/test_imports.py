"""What importing gtpo_kernels loads, and what it does not."""

import subprocess
import sys

FORBIDDEN = ("triton", "transformers", "gtpo", "gtpo_kernels._cpu", "gtpo_kernels.testing", "flash_attn", "pytest")
# of those, what running an op loads: torch itself imports triton, and the default backend its compiled module
LOADED_BY_OPS = {"triton", "gtpo_kernels._cpu"}

PROGRAM = """
import sys
import gtpo_kernels
print([name for name in {forbidden} if name in sys.modules])
import torch
gtpo_kernels.turn_returns(torch.zeros(2), torch.tensor([0, 2]))
loss = gtpo_kernels.linear_gtpo_loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1]), torch.ones(2)).loss
print(loss.item(), *(name for name in {forbidden} if name in sys.modules))
"""


def test_import_and_the_default_backend_load_nothing_heavy() -> None:
    program = PROGRAM.format(forbidden=FORBIDDEN)
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert lines[0] == "[]"
    loss, *loaded = lines[1].split()
    assert loss == "-1.0"
    assert set(loaded) <= LOADED_BY_OPS


def test_all_names_are_there() -> None:
    import gtpo_kernels

    assert sorted(gtpo_kernels.__all__) == gtpo_kernels.__all__
    assert all(getattr(gtpo_kernels, name).__doc__ for name in gtpo_kernels.__all__)
