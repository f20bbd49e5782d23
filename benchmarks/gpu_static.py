"""`make gpu-static`: what can be shown of the GPU kernels without a GPU.  Fails if a gate does.

Gates: everything compiles; nothing spills but in float64; no logit is read when it may be overwritten already; rows
whose bytes are a multiple of 16 are loaded 16 bytes at a time; the logits sweep moves at most 1.05 times the bytes of
its algorithm.
The predictions are no measurements: bytes over 3.0 TB/s, products over 700 TFLOP/s, an H100.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_compile import CSRC, TARGETS, Resources, Variant, compile_cuda, compile_triton, triton_variants

RESULTS = Path(__file__).parent / "results"
BYTES_OVER_MINIMUM = 1.05
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 700e12
# Registers, threads, blocks and shared bytes of one multiprocessor, from the CUDA C++ programming guide.
MULTIPROCESSOR = {
    "sm_80": (65536, 2048, 32, 164 << 10),
    "sm_90": (65536, 2048, 32, 228 << 10),
    "sm_100": (65536, 2048, 32, 228 << 10),
    "sm_120": (65536, 1536, 24, 100 << 10),
}
# Milliseconds that others published, each on its own machine: not to be compared across rows.
PUBLISHED = [
    ("fused linear policy loss", "8192 x 128256 x 4096 bf16", "B200", 145.1, "Liger-Kernel 0.8.0, benchmark/data csv"),
    ("eager, the same", "8192 x 128256 x 4096 bf16", "B200", 44.2, "Liger-Kernel 0.8.0, benchmark/data csv"),
    ("fused linear cross-entropy, Liger", "8192 x 151936 x 4096 bf16", "H100", 192.0, "trl#7244"),
    ("cross-entropy, eager", "8192 x 151936 x 4096 bf16", "H100", 59.0, "trl#7244"),
    ("the three matrix products alone", "8192 x 151936 x 4096 bf16", "H100", 42.0, "trl#7244"),
    ("log-probs and entropy of logits, eager", "8192 x 151936 bf16", "H100", 12.8, "trl#7244"),
    ("log-probs and entropy of logits, Triton", "8192 x 151936 bf16", "H100", 0.89, "trl#7244"),
    ("linear log-probs, CUDA, fwd + bwd", "4096 x 131072 x 2048", "H100", 105.0, "RL-Kernel, documentation"),
    ("linear log-probs, eager, fwd + bwd", "4096 x 131072 x 2048", "H100", 17.05, "RL-Kernel, documentation"),
    ("cut cross-entropy, fwd + bwd", "16384 x 248320 x 2048 bf16", "H100", 92.6, "trl#6858"),
]


def jobs(arches: list[str], kernels: list[str]) -> Iterator[tuple[str, int | Path]]:
    """(Architecture, number of the Triton variant or CUDA file), the slow ones first."""
    if not kernels:
        yield from ((arch, path) for path in sorted(CSRC.glob("*.cu")) for arch in arches if arch in MULTIPROCESSOR)
    for arch in arches:
        for index, variant in enumerate(variants(arch)):
            if not kernels or variant.name in kernels:
                yield arch, index


def variants(arch: str) -> list[Variant]:
    return list(triton_variants(int(arch[3:]) if arch in MULTIPROCESSOR else 0))


def compile_one(job: tuple[str, int | Path]) -> tuple[list[Resources], float]:
    arch, what = job
    start = time.process_time() + child_seconds()
    resources = [compile_triton(variants(arch)[what], arch)] if isinstance(what, int) else compile_cuda(what, arch)
    return resources, time.process_time() + child_seconds() - start


def child_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def occupancy(kernel: Resources) -> float | None:
    """Share of a multiprocessor's threads that its registers, shared memory and block slots allow; by formula."""
    if kernel.arch not in MULTIPROCESSOR:
        return None
    registers, threads, blocks, shared = MULTIPROCESSOR[kernel.arch]
    # registers are given to a warp in units of 256, and a block takes 1 KiB of shared memory for the system
    per_block = -(-kernel.registers * 32 // 256) * 256 * (kernel.threads // 32)
    fit = min(registers // per_block, threads // kernel.threads, blocks, shared // (kernel.shared_bytes + 1024))
    return fit * kernel.threads / threads


def faults(kernel: Resources) -> list[str]:
    """What of a compiled kernel is against the gates."""
    label = f"{kernel.backend} {kernel.name} {kernel.dtype} {kernel.shape} {kernel.arch}"
    found = []
    if kernel.spill_bytes and kernel.dtype != "fp64":
        found.append(f"{label}: {kernel.spill_bytes} bytes of registers are spilled")
    if kernel.late_loads:
        found.append(f"{label}: {kernel.late_loads} logits are loaded alone with no barrier after it, a race in place")
    if kernel.wide_loads < kernel.wide_loads_needed:
        found.append(f"{label}: {kernel.wide_loads} loads of 16 bytes, {kernel.wide_loads_needed} needed")
    return found


def row(**given: Any) -> dict[str, Any]:
    """One line of the results, with every column that the other commands have."""
    columns = ("name", "backend", "shape", "dtype", "mask_fraction", "cpu_s", "wall_s", "extra_mb", "ratio_to_floor")
    columns += ("error", "arch", "registers", "spill_bytes", "vector_bits", "bytes_over_floor")
    return {**dict.fromkeys(columns), **given}


def counted_bytes() -> list[dict[str, Any]]:
    """From a process of its own, as a kernel is either interpreted or compiled."""
    command = [sys.executable, "-m", "benchmarks.gpu_bytes"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return [json.loads(line) for line in out.splitlines()]


def predictions() -> list[tuple[str, str, float, str]]:
    """(What, shape, milliseconds, how) on an H100."""
    n, v, d, chunk = 8192, 151936, 4096, 1766
    products = 6 * n * v * d / FLOPS_PER_S
    # of each logit: float32 written, read twice, written; read and rounded to bfloat16; read by both products
    sweep = n * v * (4 + 2 * 4 + 4 + 4 + 2 + 2 * 2) / BYTES_PER_S
    weight = n / chunk * v * d * (2 * 2 + 2 * 4) / BYTES_PER_S
    total = products + sweep + weight
    return [
        ("gtpo_loss_, in place", f"{n} x {v} bf16", 1e3 * 3 * n * v * 2 / BYTES_PER_S, "2 reads + 1 write"),
        ("gtpo_loss_, in place", f"{n} x 32000 bf16", 1e3 * 2 * n * 32000 * 2 / BYTES_PER_S, "1 read + 1 write"),
        ("token_logprobs, forward", f"{n} x {v} bf16", 1e3 * n * v * 2 / BYTES_PER_S, "1 read"),
        ("linear_token_logprobs, forward", f"{n} x {v} x {d} bf16", 1e3 * 2 * n * v * d / FLOPS_PER_S, "2NVD"),
        (
            "linear_gtpo_loss, fwd + bwd",
            f"{n} x {v} x {d} bf16",
            1e3 * total,
            f"6NVD {1e3 * products:.1f} + logits {1e3 * sweep:.1f} + weight traffic {1e3 * weight:.1f}, not overlapped",
        ),
    ]


def table(header: str, rows: Iterator[tuple[object, ...]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *([str(cell) for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(kernels: list[Resources], counted: list[dict[str, Any]], notes: list[str]) -> str:
    """The Markdown page."""
    resources = (
        (
            k.backend,
            k.name,
            k.dtype,
            k.shape,
            k.arch,
            k.threads,
            k.registers,
            k.spill_bytes,
            k.shared_bytes,
            k.vector_bits,
            "-" if (share := occupancy(k)) is None else f"{share:.0%}",
        )
        for k in kernels
    )
    traffic = (
        (
            c["name"],
            c["shape"],
            c["dtype"],
            c["counted_bytes"],
            f"{c['bytes_over_minimum']:.4f}",
            f"{c['bytes_over_floor']:.4f}",
        )
        for c in counted
    )
    return "\n".join(
        [
            "# GPU kernels, without a GPU\n",
            "Written by `make gpu-static`. Nothing here was run on a GPU.\n",
            *notes,
            "## Bytes of the logits sweep, counted in the interpreter (3 rows)\n",
            table("sweep | shape | dtype | bytes | over its minimum | over 2NV", traffic),
            "Rows of up to 32,768 are read once and written once (16,384 of float32 on sm_100 and sm_120, and under a"
            " softcap); longer ones are read twice.\n",
            "## Predicted on an H100 (3.0 TB/s, 700 TFLOP/s)\n",
            table(
                "op | shape | predicted ms | counted",
                ((name, shape, f"{ms:.2f}", how) for name, shape, ms, how in predictions()),
            ),
            "## Published by others, each on its own machine\n",
            table("what | shape | device | ms | source", iter(PUBLISHED)),
            "## Resources\n",
            "Registers of a thread; spilled and shared bytes; the widest global load; occupancy by formula.\n",
            table(
                "by | kernel | dtype | shape | arch | threads | registers | spilled | shared | load bits | occupancy",
                resources,
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="only this one; writes no results")
    parser.add_argument("--kernel", action="append", default=[], help="only this Triton kernel; writes no results")
    options = parser.parse_args()
    start, notes = time.perf_counter(), []
    todo = list(jobs(options.arch or list(TARGETS), options.kernel))
    if shutil.which("nvcc") is None and not options.kernel:
        notes.append("No CUDA kernel is listed: nvcc is not on the PATH.\n")
        todo = [job for job in todo if isinstance(job[1], int)]
    kernels, rows, failed = [], [], []
    with ProcessPoolExecutor() as pool:
        for resources, cpu_s in pool.map(compile_one, todo):
            for kernel in resources:
                kernels.append(kernel)
                failed += faults(kernel)
                rows.append(row(**asdict(kernel), occupancy=occupancy(kernel), cpu_s=round(cpu_s / len(resources), 2)))
    counted = [] if options.kernel else counted_bytes()
    for count in counted:
        rows.append(row(backend="triton", **count))
        if count["bytes_over_minimum"] > BYTES_OVER_MINIMUM:
            label = f"{count['name']} {count['dtype']} {count['shape']}"
            failed.append(f"{label}: {count['bytes_over_minimum']:.3f} x the minimum")
    page = report(kernels, counted, notes)
    print(page)
    if not options.arch and not options.kernel:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu-static.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "gpu_static.md").write_text(page)
    print(f"{len(kernels)} kernels in {time.perf_counter() - start:.0f} s", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
