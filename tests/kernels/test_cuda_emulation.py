"""The CUDA kernels on the host: races under the thread sanitizer, and what only their two memory paths can get wrong.

Every other test of this folder runs them too, as backend="cuda"; see emulation.py.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gtpo_kernels import BackendUnavailable, gtpo_loss, token_logprobs
from gtpo_kernels.backend import select_backend
from gtpo_kernels.testing import assert_matches_reference
from tests.kernels.conftest import DEVICE, Case, logits_case, logits_loss_case, loss_and_gradients, row_temperature
from tests.kernels.emulation import CSRC, compile_for_host

needs_emulation = pytest.mark.skipif(DEVICE.type != "cpu", reason="needs a CPU: on a GPU the kernels run themselves")
# by parameter, so that the shared fixture emulates it
CUDA = pytest.mark.parametrize("cuda", ["cuda"])
ALIGNED, SCALAR = 0, 1


def at_offset(logits: Tensor, offset: int) -> Tensor:
    """The same logits, in memory that starts `offset` elements after a multiple of 64 bytes."""
    memory = torch.empty(logits.numel() + 64, dtype=logits.dtype, device=logits.device)
    start = -memory.data_ptr() % 64 // logits.element_size() + offset
    return memory[start : start + logits.numel()].view(logits.shape).copy_(logits)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [8, 507, 512, 9000])
@pytest.mark.parametrize("offset", [ALIGNED, SCALAR])
def test_rows_at_any_address(cuda: str, dtype: torch.dtype, vocab: int, offset: int) -> None:
    cases: list[Case] = [logits_case(9, vocab, seed=seed, dtype=dtype) for seed in range(4)]
    for case in cases:
        case["logits"] = at_offset(case["logits"], offset)
        assert case["logits"].data_ptr() % 16 == offset * dtype.itemsize
    assert_matches_reference(
        token_logprobs, cases, ["logits"], backend=cuda, temperature=row_temperature(9), softcap=5.0
    )


@CUDA
def test_both_paths_agree(cuda: str) -> None:
    case = logits_loss_case(13, 512)
    results = []
    for offset in (ALIGNED, SCALAR):
        moved = {**case, "logits": at_offset(case["logits"], offset)}
        results.append(loss_and_gradients(gtpo_loss, moved, ["logits"], backend=cuda))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sanitized programs; skips where the compiler makes none."""
    folder = tmp_path_factory.mktemp("races")
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = ["g++", "-fsanitize=thread", str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    if not shutil.which("g++") or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs g++ with -fsanitize=thread")
    return folder


def races(csrc: Path, program: Path) -> tuple[int, str]:
    """(Number of races, output) of all kernels of `csrc`, compiled for the host under the thread sanitizer."""
    compile_for_host(csrc, csrc / "emulation" / "races.cpp", program, "-O1", "-g", "-fsanitize=thread")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        # the sanitizer of some compilers cannot live with a randomised address space
        done = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("needs a thread sanitizer that starts here: its memory mapping is refused")
    return done.stderr.count("WARNING: ThreadSanitizer: data race"), done.stdout + done.stderr


@needs_emulation
def test_no_kernel_has_a_race(sanitized: Path) -> None:
    count, output = races(CSRC, sanitized / "clean")
    assert count == 0, output
    assert output == "all kernels ran\n"


@needs_emulation
@pytest.mark.parametrize(
    ("source", "barrier"), [("logits_sweep.cuh", "sync_block"), ("turn_advantages.cu", "sync_grid")]
)
def test_a_missing_barrier_is_a_race(sanitized: Path, source: str, barrier: str) -> None:
    csrc = sanitized / f"without_{barrier}"
    shutil.copytree(CSRC, csrc)
    text, removed = re.subn(rf"^ +{barrier}\(\);\n", "", (csrc / source).read_text(), count=1, flags=re.MULTILINE)
    assert removed == 1
    (csrc / source).write_text(text)
    count, output = races(csrc, csrc / "broken")
    assert count > 0
    assert source in output


@needs_emulation
def test_without_a_gpu_it_says_what_it_needs() -> None:
    with pytest.raises(BackendUnavailable, match="backend='cuda' runs on NVIDIA GPUs only, got tensors on cpu"):
        select_backend("gtpo_loss", "cuda", torch.device("cpu"))
    with pytest.raises(BackendUnavailable, match="backend='cuda' has no kernel for clipped_loss"):
        select_backend("clipped_loss", "cuda", torch.device("cuda"))
