"""`make gpu-check`: on a machine with an NVIDIA GPU, all kernel tests on it and then the benchmarks, in ten minutes.

Writes gpu_check.md and gpu-check.json.  Needs torch and, for the tests, pytest and hypothesis; what else is missing is
a row marked absent.  Every shape is measured in a process of its own, begun again without a contestant that ends it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import linear, logits
from benchmarks.measure import RESULTS, Row, compare, device_name, markdown, set_ratios, smoke_run

ROOT = Path(__file__).parents[1]
BACKENDS = ("triton", "cuda", "torch")
# The benchmarks have what building and testing leave.
TOTAL_S, BUILD_S, TESTS_S = 570.0, 150.0, 200.0
ROUNDS = 10


@dataclass(frozen=True)
class Shape:
    """Of the loss from hidden states; of that from logits where the width is None."""

    num_rows: int
    vocab: int
    width: int | None
    dtype: torch.dtype = torch.bfloat16


# The largest last: where time or memory runs out, the others stand.
SHAPES = [
    Shape(8192, 128256, 2048),
    Shape(8192, 128256, None),
    Shape(8192, 151936, None),
    Shape(8192, 151936, 2048),
    Shape(8192, 128256, 4096),
    Shape(8192, 151936, 4096),
]
SMOKE_SHAPES = [Shape(64, 257, 32), Shape(64, 257, None)]


def contestants(shape: Shape) -> list:
    """The floor first, then ours, so that they stand whatever a peer does."""
    if shape.width is None:
        return logits.contestants(BACKENDS)
    peers = [replace(peer, max_rounds=ROUNDS) for peer in linear.PEERS]
    return [*linear.FLOORS, *linear.our_contestants(BACKENDS), linear.EAGER, *peers]


def measure_shape(
    shape: Shape, device: torch.device, rounds: int, excluded: Sequence[str], deadline: float, progress: Path
) -> list[Row]:
    """Rows in the order of the contestants; the excluded ones are left out.  progress: keeps the name last begun."""
    # TF32 would spoil the exact result, and eager products of float32
    torch.backends.cuda.matmul.allow_tf32 = False
    axes = {"N": shape.num_rows, "V": shape.vocab}
    exact_dtype = torch.float32 if device.type == "cuda" else torch.float64
    if shape.width is None:
        batch = logits.make_batch(shape.num_rows, shape.vocab, dtype=shape.dtype, device=device)
        exact = logits.exact_outputs(batch, exact_dtype)
    else:
        axes["D"] = shape.width
        batch = linear.make_batch(*axes.values(), mask_fraction=0.0, dtype=shape.dtype, device=device)
        exact = linear.exact_outputs(batch, exact_dtype)
    dtype = str(shape.dtype).removeprefix("torch.")
    rows = compare(
        [contestant for contestant in contestants(shape) if contestant.name not in excluded],
        batch,
        exact,
        lambda name, backend: Row(name, backend, axes, dtype, 0.0),
        allowed=linear.ALLOWED_ERROR[shape.dtype],
        rounds=rounds,
        device=device,
        started=progress.write_text,
        deadline=deadline,
    )
    set_ratios(rows, rows[0].wall_s, by="wall_s")
    return rows


def measure_in_process(index: int, options: argparse.Namespace, deadline: float, folder: Path) -> list[Row]:
    """The rows of one shape, measured by another process."""
    shape = (SMOKE_SHAPES if options.smoke else SHAPES)[index]
    rows_file, progress = folder / "rows.json", folder / "progress"
    failed: dict[str, str] = {}
    rows: dict[str, Row] = {}
    while not rows:
        rows_file.unlink(missing_ok=True)
        progress.write_text("")
        left = deadline - time.monotonic()
        if left < 5 and not options.smoke:
            break
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", options.device, "--shape", str(index)]
        command += ["--folder", str(folder), "--seconds", str(left), *(["--smoke"] if options.smoke else [])]
        try:
            done = subprocess.run(
                [*command, "--without", *failed], cwd=ROOT, capture_output=True, text=True, timeout=max(left, 0) + 30
            )
            reason = " ".join(done.stderr.split())[-200:] or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = "took too long"
        if rows_file.exists():
            rows = {row["name"]: Row(**row) for row in json.loads(rows_file.read_text())}
            break
        culprit = progress.read_text()
        if not culprit or culprit in failed:
            # not even the exact result
            failed |= {c.name: reason for c in contestants(shape) if c.name not in failed}
            break
        failed[culprit] = f"ended its process: {reason}"
    return [rows.get(c.name) or _empty_row(shape, c, failed.get(c.name)) for c in contestants(shape)]


def _empty_row(shape: Shape, contestant: linear.Contestant, reason: str | None) -> Row:
    axes = {"N": shape.num_rows, "V": shape.vocab} | ({} if shape.width is None else {"D": shape.width})
    dtype = str(shape.dtype).removeprefix("torch.")
    note = "not run: out of time" if reason is None else f"failed: {reason}"
    return Row(contestant.name, contestant.backend, axes, dtype, 0.0, note=note)


def has_cuda_module() -> bool:
    # in a process of its own: an editable install made meanwhile is seen only by a new one
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('gtpo_kernels._cuda') is None)"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def build_cuda_module(seconds: float) -> str:
    """Install the package with its CUDA kernels, for the GPU at hand.  Returns what became of it, Markdown."""
    if has_cuda_module():
        return "Module of the CUDA kernels: installed."
    if shutil.which("nvcc") is None:
        return "Module of the CUDA kernels: **not built**, no nvcc on the PATH."
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", "."]
    for define in ("GTPO_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={major}{minor}"):
        command += ["--config-settings", f"cmake.define.{define}"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        reason = " ".join(done.stderr.split())[-300:]
    except subprocess.TimeoutExpired:
        reason = f"took more than {seconds:.0f} s"
    return f"Module of the CUDA kernels: {'built' if has_cuda_module() else f'**not built**, {reason}'}."


def run_tests(device: str, paths: Sequence[str], seconds: float) -> str:
    """Run the kernel tests on the device.  Returns what became of them, Markdown."""
    if not paths:
        return "Kernel tests: **left out**."
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"Kernel tests: **not run**, {' and '.join(missing)} not installed."
    environment = os.environ | {"GTPO_TEST_DEVICE": device}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *paths]
    if device == "cuda" and not has_cuda_module():
        command += ["-k", "not cuda"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            verdict = "**passed**" if code == 0 else f"**failed** (exit code {code})"
        except subprocess.TimeoutExpired:
            verdict = f"**stopped** after {seconds:.0f} s"
        output.seek(0)
        lines = output.read().splitlines()
    shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40] + lines[-3:]
    return "\n".join([f"Kernel tests on {device}: {verdict}.", "", "```", *shown, "```"])


def report(device: torch.device, findings: str, rows: Sequence[Row]) -> str:
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for package in ("triton", "liger-kernel", "cut-cross-entropy", "trl"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return f"""# gpu-check

{device_name(device)}; {", ".join(versions)}. Written by `make gpu-check`.

{findings}

Forward and backward. Wall ms: between events of the device, medians of interleaved rounds after a warm-up. Extra MiB:
peak of allocated memory above what was held before, gradients included. x floor: over the first row of the shape, the
three matrix products (from logits: one in-place product of the logits with a number). Errors: loss and gradients,
relative to float32 without TF32 (float64 on a CPU); above {linear.ALLOWED_ERROR[torch.bfloat16]:g} a row is refused.

{markdown(rows)}
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" to try the program out')
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: no true figures")
    parser.add_argument("--results", type=Path, help="folder of gpu_check.md and gpu-check.json")
    parser.add_argument(
        "--tests", nargs="*", default=["tests/kernels"], help="paths of the tests; none to leave them out"
    )
    within = parser.add_argument_group("of the processes that it starts")
    within.add_argument("--shape", type=int, help="measure this shape alone")
    within.add_argument("--folder", type=Path, help="for its rows")
    within.add_argument("--seconds", type=float, help="to be done in")
    within.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    options = parser.parse_args(arguments)
    if options.results is None and not options.smoke:
        options.results = RESULTS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 without a GPU, 1 where the kernel tests did not pass or one of our kernels failed, else 0."""
    started = time.monotonic()
    options = parse(arguments)
    if options.device == "cuda" and (not torch.cuda.is_available() or torch.version.hip is not None):
        print("gpu-check: torch finds no NVIDIA GPU here; --device cpu --smoke tries the program out", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    shapes = SMOKE_SHAPES if options.smoke else SHAPES
    if options.shape is not None:
        with smoke_run(options.smoke):
            measured = measure_shape(
                shapes[options.shape],
                device,
                1 if options.smoke else ROUNDS,
                options.without,
                started + options.seconds,
                options.folder / "progress",
            )
        (options.folder / "rows.json").write_text(json.dumps([asdict(row) for row in measured]))
        return 0
    findings = []
    if options.device == "cuda":
        findings.append(build_cuda_module(BUILD_S))
        print(findings[-1], flush=True)
    findings.append(run_tests(options.device, options.tests, TESTS_S))
    print(findings[-1], flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, shape in enumerate(shapes):
            print(f"{shape} ...", flush=True)
            left = started + TOTAL_S - time.monotonic()
            share = left / (len(shapes) - index) * (1.0 if index == len(shapes) - 1 else 1.5)
            rows += measure_in_process(index, options, time.monotonic() + min(share, left), Path(folder))
    text = report(device, "\n\n".join(findings), rows)
    print(text)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "gpu_check.md").write_text(text)
        (options.results / "gpu-check.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"wrote gpu_check.md and gpu-check.json in {options.results}")
    ours_failed = any(row.backend in BACKENDS and "gtpo_loss" in row.name and _broken(row) for row in rows)
    return 1 if ours_failed or "**failed**" in findings[-1] else 0


def _broken(row: Row) -> bool:
    return row.note.startswith(("failed", "refused"))


if __name__ == "__main__":
    sys.exit(main())
