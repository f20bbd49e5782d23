"""Compiles every GPU kernel ahead of time, without a GPU, and reads from the machine code what it will use.

Triton kernels, in every dtype, with the blocks and warps of the backend: for sm_80, sm_90, sm_100, sm_120 and gfx942.
CUDA kernels, with nvcc: for the first four.  The tools that read cubins come with Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gtpo_kernels.clipped_loss import kernel_triton as clipped
from gtpo_kernels.gtpo_loss import kernel_triton as loss
from gtpo_kernels.token_logprobs import kernel_triton_sweeps as sweeps
from gtpo_kernels.token_logprobs import kernel_triton_tile as tiles
from gtpo_kernels.triton_math import LAUNCH
from gtpo_kernels.turn_advantages import kernel_triton as turns

CSRC = Path(__file__).parent.parent / "csrc"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# Vocabularies of Llama 2, of Qwen2.5, and of GPT-2, whose rows are aligned to nothing.
SHORT, LONG, ODD = 32000, 151936, 50257


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.  constants: of its constexpr arguments, and None for tensors that are left out.

    types: of pointers, by name.  wide_loads: loads of 16 bytes that a thread needs, 0 where the row is not aligned.
    """

    name: str
    kernel: Any
    dtype: str
    shape: str
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    wide_loads: int = 0


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.  vector_bits: of the widest global load.  wide_loads: loads of 16 bytes.

    late_loads: of `late_loads`, for a kernel that may write d_logits over its logits.
    """

    name: str
    backend: str
    arch: str
    dtype: str
    shape: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    vector_bits: int
    wide_loads: int
    wide_loads_needed: int
    threads: int
    late_loads: int = 0


def triton_variants(capability: int) -> Iterator[Variant]:
    """Every Triton kernel in every dtype, as the backend launches it for a large batch of the named vocabulary."""
    for dtype, torch_dtype in DTYPES.items():
        acc = "fp64" if dtype == "fp64" else "fp32"
        matrix = types(acc, logits_ptr=dtype, d_logits_ptr=dtype)
        rows = (
            [(SHORT, False), (LONG, False), (LONG, True), (ODD, False)]
            if dtype != "fp64"
            else [(LONG, False), (LONG, True)]
        )
        for vocab, softcap in rows:
            logits = torch.empty(1, vocab, dtype=torch_dtype)
            plan = sweeps.row_plan(4096, vocab, sweeps.max_block(logits, softcap, capability), softcap, logits)
            passes = 1 if plan.one_block else 2
            constants = {**cut(plan), "ONE_BLOCK": plan.one_block, "HAS_SOFTCAP": softcap, "ALL_METRICS": False}
            name, wide = "sweep" + "+softcap" * softcap, wide_loads(plan, torch_dtype) * passes
            yield Variant(name, loss.sweep_kernel, dtype, f"V={vocab}", constants, matrix, plan.num_warps, 3, wide)
            if vocab == LONG and not softcap:
                for label, changed in (("rows", of_rows(constants)), ("forward", {**constants, "d_logits_ptr": None})):
                    kernel, shape = loss.sweep_kernel, f"V={vocab} {label}"
                    yield Variant("sweep", kernel, dtype, shape, changed, matrix, plan.num_warps)
        logits = torch.empty(1, LONG, dtype=torch_dtype)
        plan = sweeps.row_plan(4096, LONG, sweeps.STREAM_BLOCK, False, logits)
        whole = {"ONE_BLOCK": False, "SPLIT": False, "counted_ptr": None, "parts_ptr": None, "y_target_ptr": None}
        for name, kernel, label, extra in (
            (
                "statistics",
                sweeps.statistics_kernel,
                " split",
                {"ONE_BLOCK": False, "SPLIT": True, "counted_ptr": None},
            ),
            ("statistics", sweeps.statistics_kernel, "", whole),
            ("gradient", sweeps.gradient_kernel, " entropy", {}),
            ("gradient", sweeps.gradient_kernel, "", {"d_entropy_ptr": None}),
        ):
            constants = {**cut(plan), "HAS_SOFTCAP": False, **extra}
            wide = wide_loads(plan, torch_dtype)
            yield Variant(name, kernel, dtype, f"V={LONG}{label}", constants, matrix, plan.num_warps, 3, wide)
            # as the losses from hidden states call them, with the rows that count
            chosen = {key: value for key, value in of_rows(constants).items() if key != "counted_ptr"}
            yield Variant(name, kernel, dtype, f"V={LONG}{label} rows", chosen, matrix, plan.num_warps)
        constants = {**cut(plan), "HAS_SOFTCAP": False, **whole, "ONE_BLOCK": True}
        yield Variant("statistics", sweeps.statistics_kernel, dtype, "one block", constants, matrix, plan.num_warps)
        if dtype != "fp64":
            tile = tiles.tile_plan(*torch.empty(2, 1, 4096, dtype=torch_dtype), capability)
            blocks = {"UNIT": tile.unit, "BLOCK_N": tile.rows, "BLOCK_V": tile.vocab, "BLOCK_D": tile.width}
            constants = {**blocks, "HAS_SOFTCAP": False, "UPCAST": False, "bias_ptr": None, "row_inverse_ptr": None}
            operands = types(acc, hidden_ptr=dtype, weight_ptr=dtype)
            yield Variant(
                "tile", tiles.tile_kernel, dtype, "D=4096", constants, operands, tile.num_warps, tile.num_stages
            )
    for acc in ("fp32", "fp64"):
        yield Variant("merge", sweeps.merge_kernel, acc, "", merge_constants(), types(acc), 1)
        chosen = {key: value for key, value in of_rows(merge_constants()).items() if key != "counted_ptr"}
        yield Variant("merge", sweeps.merge_kernel, acc, "rows", chosen, types(acc), 1)
        yield Variant("clipped_loss", clipped.block_kernel, acc, "", block_constants(), types(acc), 4)
        width = {"BLOCK_B": 64, "WIDTH": clipped.WIDTH}
        yield Variant("clipped_loss_combine", clipped.combine_kernel, acc, "", width, types(acc), 4)
    yield from turn_variants()


def turn_variants() -> Iterator[Variant]:
    scan, scope = {"BLOCK_K": turns.SCAN_TURNS}, {"BLOCK_K": turns.SCOPE_TURNS}
    width = {"WIDTH": len(turns.Statistics._fields)}
    yield Variant("returns", turns.returns_kernel, "fp64", "", scan, types("fp32"), 1)
    yield Variant("count", turns.count_kernel, "int64", "", {"BLOCK_N": turns.BLOCK}, types("fp32"))
    yield Variant("scope_statistics", turns.statistics_kernel, "fp64", "", {**scope, **width}, types("fp32"), 1)
    yield Variant("normalise", turns.normalise_kernel, "fp64", "", {"BLOCK_K": turns.BLOCK, **width}, types("fp32"))
    yield Variant("round", turns.round_kernel, "fp32", "", {"BLOCK_K": turns.BLOCK}, types("fp32"))
    yield Variant("look_up", turns.look_up_kernel, "fp32", "", {"BLOCK_N": turns.BLOCK}, types("fp32"))


def cut(plan: sweeps.RowPlan) -> dict[str, Any]:
    """Constants of a kernel that works on all rows, at one temperature."""
    return {"UNIT": plan.unit, "BLOCK_V": plan.block, "row_inverse_ptr": None, "rows_ptr": None}


def of_rows(constants: dict[str, Any]) -> dict[str, Any]:
    """The same for a kernel that is given its rows, each with a temperature of its own."""
    return {key: value for key, value in constants.items() if key not in ("rows_ptr", "row_inverse_ptr")}


def wide_loads(plan: sweeps.RowPlan, dtype: torch.dtype) -> int:
    """16-byte loads of a thread for one block of a row, 0 where the row is not aligned."""
    return plan.block * dtype.itemsize // (plan.num_warps * 32 * sweeps.VECTOR_BYTES) if plan.unit > 1 else 0


def merge_constants() -> dict[str, Any]:
    absent = {"rows_ptr": None, "counted_ptr": None, "row_inverse_ptr": None}
    return {"BLOCK_N": sweeps.MERGE_ROWS, "HAS_SOFTCAP": False, **absent}


def block_constants() -> dict[str, Any]:
    return {"BLOCK_N": clipped.TOKENS, "WIDTH": clipped.WIDTH, "ALL_METRICS": False}


def types(acc: str, **others: str) -> dict[str, str]:
    """Element types of the pointers, by name; those that are not listed are of the accumulator dtype."""
    fixed = {
        "rows_ptr": "i64",
        "targets_ptr": "i64",
        "turn_ids_ptr": "i64",
        "cu_turns_ptr": "i64",
        "scopes_ptr": "i64",
        "ends_ptr": "i64",
        "order_ptr": "i64",
        "starts_ptr": "i64",
        "entries_ptr": "i64",
        "loss_mask_ptr": "i1",
        "counted_ptr": "i1",
        "num_tokens_ptr": "i32",
        "row_inverse_ptr": "fp64",
        **{
            name: "fp64"
            for name in ("sums_ptr", "returns_ptr", "x_ptr", "mass_ptr", "statistics_ptr", "normalised_ptr")
        },
    }
    return {"": acc, **fixed, **others}


def compile_triton(variant: Variant, arch: str) -> Resources:
    """Compile one Triton kernel for one architecture."""
    target = TARGETS[arch]
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        name = parameter.name
        if name in variant.constants:
            signature[name], constants[name] = "constexpr", variant.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + variant.types.get(name, variant.types[""])
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type or "i32"
    num_warps = max(1, variant.num_warps * 32 // target.warp_size)
    stages = 2 if target.backend == "hip" else variant.num_stages
    options = {"num_warps": num_warps, "num_stages": stages, **LAUNCH}
    source = ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    threads = num_warps * target.warp_size
    read = read_hsaco(compiled.asm["amdgcn"]) if target.backend == "hip" else read_cubin(compiled.asm["cubin"])[0][1:]
    needed = variant.wide_loads if target.backend == "cuda" else 0
    shared = compiled.metadata.shared
    return Resources(
        variant.name,
        "triton",
        arch,
        variant.dtype,
        variant.shape,
        *read[:2],
        shared,
        *read[3:],
        needed,
        threads,
        late_loads(compiled.asm["ttir"]) if writes_logits(signature) else 0,
    )


def writes_logits(signature: Mapping[str, str]) -> bool:
    """Whether the kernel gets a place for d_logits, which may be its logits: forward only, that is the constant None.

    >>> [writes_logits(given) for given in ({"d_logits_ptr": "*bf16"}, {"d_logits_ptr": "constexpr"}, {})]
    [True, False, False]
    """
    return signature.get("d_logits_ptr", "constexpr") != "constexpr"


def late_loads(ttir: str) -> int:
    """Loads of a single logit that no barrier follows; a reduction has some.

    Every thread loads a scalar.  Without a barrier before the stores of the row, in place, a fast thread would
    overwrite what a slow one has still to read.
    """
    of_logits, late = {"%logits_ptr"}, 0
    for line in ttir.splitlines():
        if moved := re.search(r"(%\S+) = tt\.addptr (%\S+), .*: !tt\.ptr<", line):
            of_logits |= {moved[1]} if moved[2] in of_logits else set()
        if '"tt.reduce"' in line or "barrier" in line:
            late = 0
        scalar = re.search(r"tt\.load (%\S+?)[ ,].*: !tt\.ptr<", line)
        late += bool(scalar and scalar[1] in of_logits)
    return late


def read_hsaco(assembly: str) -> tuple[int, int, int, int, int]:
    """(Registers, spilled bytes, shared bytes, bits of the widest global load, 16-byte loads) of AMD assembly."""

    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    words = [int(x or 1) for x in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", assembly)]
    narrow = [int(x) for x in re.findall(r"(?:global|buffer)_load_[us](?:short|byte)", assembly) if x.isdigit()]
    widest = max([32 * n for n in words] + narrow + [16])
    return count("vgpr_count"), count("private_segment_fixed_size"), 0, widest, words.count(4)


def read_cubin(cubin: bytes) -> list[tuple[str, int, int, int, int, int]]:
    """(Mangled name, and the same as above) of every function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        sass = run(TOOLS / "cuobjdump", "--dump-sass", file.name)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    rows = []
    pattern = r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for function, registers, stack, shared, local in re.findall(pattern, usage):
        # the width stands among the suffixes of the instruction, and is 32 where it does not
        loads = [
            re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffix) for suffix in re.findall(r"LDG(\S*)", bodies[function])
        ]
        widths = [int(width[1].strip("US")) if width else 32 for width in loads]
        spilled = int(stack) + int(local)
        rows.append((function, int(registers), spilled, int(shared), max(widths, default=0), widths.count(128)))
    return rows


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def compile_cuda(source: Path, arch: str) -> list[Resources]:
    """Compile one CUDA file with nvcc for one architecture: a row for each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        run("nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", f"-I{source.parent}", source, "-o", cubin)
        functions = read_cubin(cubin.read_bytes())
    rows = []
    for mangled, *used in functions:
        name, dtype, aligned = describe(mangled)
        threads = launch_bound(source, name)
        rows.append(Resources(name, "cuda", arch, dtype, source.name, *used, int(aligned), threads))
    return rows


def launch_bound(source: Path, kernel: str) -> int:
    """The threads of a block that a kernel's __launch_bounds__ gives it."""
    text = source.read_text() + "".join(header.read_text() for header in source.parent.glob("*.cuh"))
    constant = re.search(rf"__launch_bounds__\((\w+)[^)]*\) {kernel}\(", text)
    assert constant, f"{source.name}: no launch bound of {kernel}"
    value = re.search(rf"constexpr int {constant[1]} = (\d+);", text)
    assert value, f"{source.name}: no value of {constant[1]}"
    return int(value[1])


def describe(mangled: str) -> tuple[str, str, bool]:
    """(Name, dtype, whether it is the kernel of aligned rows) of a function template <class T, bool aligned>."""
    named = re.search(r"\d([a-z]+_[a-z_]+)(?=I|E)", mangled.split("GLOBAL__N")[-1])
    name = named[1] if named else mangled
    template = re.search(r"I(f|d|6__half|13__nv_bfloat16)Lb([01])E", mangled)
    dtypes = {"f": "fp32", "d": "fp64", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
    return (name, dtypes[template[1]], template[2] == "1") if template else (name, "fp64", False)
