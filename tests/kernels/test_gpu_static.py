"""`make gpu-static` for one kernel: it compiles for every target without a GPU.  And its gates."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_compile import TARGETS, Resources, late_loads, writes_logits
from benchmarks.gpu_static import faults, occupancy

GOOD = Resources("sweep", "triton", "sm_90", "bf16", "V=32000", 64, 0, 128, 128, 4, 4, 1024)


def test_a_kernel_compiles_for_every_target(tmp_path: Path) -> None:
    # in a process of its own, as here the kernels are interpreted
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--kernel", "returns"]
    root = Path(__file__).parent.parent.parent
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stdout + run.stderr
    for arch in TARGETS:
        assert run.stdout.count(f"| triton | returns | fp64 |  | {arch} |") == 1
    assert run.stdout.count("| triton |") == len(TARGETS)


def test_a_spill_and_a_narrow_load_are_faults() -> None:
    assert faults(GOOD) == []
    (fault,) = faults(replace(GOOD, spill_bytes=8))
    assert fault == "triton sweep bf16 V=32000 sm_90: 8 bytes of registers are spilled"
    assert faults(replace(GOOD, spill_bytes=8, dtype="fp64")) == []
    (fault,) = faults(replace(GOOD, wide_loads=3))
    assert fault == "triton sweep bf16 V=32000 sm_90: 3 loads of 16 bytes, 4 needed"


LOAD = """
%row_ptr = tt.addptr %logits_ptr, %offset : !tt.ptr<bf16>, i64
%y = tt.load %row_ptrs, %mask : tensor<64x!tt.ptr<bf16>>
%other = tt.load %advantages_ptr : !tt.ptr<f32>
%target_ptr = tt.addptr %row_ptr, %target : !tt.ptr<bf16>, i32
%y_target = tt.load %target_ptr : !tt.ptr<bf16>
"""
REDUCE, BARRIER, STORE = (
    '%max = "tt.reduce"(%y) <{axis = 0 : i32}> ({\n',
    "gpu.barrier\n",
    "tt.store %row_ptrs, %d : tensor\n",
)


def test_only_a_kernel_that_gets_a_place_for_gradients_can_overwrite_logits() -> None:
    assert writes_logits({"logits_ptr": "*bf16", "d_logits_ptr": "*bf16"})
    # forward only: the place is the constant None
    assert not writes_logits({"logits_ptr": "*bf16", "d_logits_ptr": "constexpr"})
    assert not writes_logits({"logits_ptr": "*bf16"})


def test_a_logit_that_may_be_overwritten_before_it_is_read_is_a_fault() -> None:
    assert late_loads(REDUCE + LOAD + STORE) == 1
    assert late_loads(LOAD + LOAD + STORE) == 2
    for ordered in (LOAD + REDUCE + STORE, REDUCE + LOAD + BARRIER + STORE, REDUCE + STORE):
        assert late_loads(ordered) == 0
    (fault,) = faults(replace(GOOD, late_loads=1))
    assert fault.endswith("sm_90: 1 logits are loaded alone with no barrier after it, a race in place")


def test_occupancy_by_formula() -> None:
    # 64 registers x 1,024 threads fill the register file of one of two such blocks
    assert occupancy(GOOD) == 0.5
    # 100 KiB of shared memory fit twice, of 8 blocks of 256 threads
    assert occupancy(replace(GOOD, registers=32, threads=256, shared_bytes=100 << 10)) == 0.25
    assert occupancy(replace(GOOD, arch="gfx942")) is None
