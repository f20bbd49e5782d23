"""Imports point downwards only. Read from the syntax trees, so an import inside a function counts like any other."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module of gtpo imports only from layers below its own, or from its own package.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("types", "methods", "token_ids", "config_values", "config_lines", "loading", "daemon_thread", "loop_thread"),
        *("sampler", "normal_form"),
    ),
    ("config", "parsing", "templates"),
    ("sandbox",),
    ("tools", "chat"),
    ("environments",),
    ("attention", "batch", "drawing", "decoding_steps", "reward_functions"),
    ("rewards",),
    ("trial", "models", "lora", "masters"),
    ("credit", "loss", "policy"),
    ("local_sampler", "schedule"),
    ("rollout",),
    ("assembly", "sft", "evaluation", "metrics", "checkpoints", "provenance", "memory", "staleness", "finite"),
    ("run_folder", "callbacks"),
    ("learner", "report", "starter"),
    ("trainer",),
    ("__main__",),
)
# Adapters to foreign trainers stand outside the order: they may import anything, and nothing imports them.
OUTSIDE = ("__init__", "adapters")

# Which parts of gtpo may import a third-party package, and which of its modules; None is all of them.
RESTRICTED: dict[str, dict[str, tuple[str, ...] | None]] = {
    "transformers": {
        "models": None,
        "policy": ("transformers.modeling_utils",),
        "tools": ("transformers.utils",),
        "chat": ("transformers.utils",),
    },
    "peft": {"lora": None},
    "flash_attn": {"attention": None},
    "reasoning_gym": {"environments": None},
}

# Maths only: no I/O, no clock, no scheduling, no randomness but what is passed in.
PURE = ("methods", "rewards", "credit", "loss", "batch")
IMPURE_IMPORTS = ("asyncio", "io", "multiprocessing", "os", "pathlib", "random", "socket", "subprocess", "time")

KERNELS_NEVER = ("gtpo", "transformers", "flash_attn")
# Importing gtpo_kernels loads none of these, so only the kernel files themselves may name them.
KERNEL_FILES_ONLY: dict[str, tuple[str, ...]] = {
    "triton": ("kernel_triton.py", "kernel_triton_sweeps.py", "kernel_triton_tile.py", "triton_math.py"),
    "gtpo_kernels._cpu": ("kernel_cpp.py",),
    "gtpo_kernels._cuda": ("kernel_cuda.py", "cuda_launch.py"),
}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Dotted names that `source`, a module inside `package`, imports; `from a import b` gives "a.b".

    >>> list(imported_modules("import a.b\\nfrom ..c import d\\nfrom . import e", package="p.q"))
    ['a.b', 'p.c.d', 'p.q.e']
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def is_within(name: str, module: str) -> bool:
    """
    >>> is_within("torch.nn.functional", "torch"), is_within("torchvision", "torch")
    (True, False)
    """
    return name == module or name.startswith(module + ".")


def imports_of(package: str) -> list[tuple[Path, str, str]]:
    """(file, top-level part of the package it belongs to, imported dotted name) for every import of a package."""
    rows = []
    for path in sorted((ROOT / package).rglob("*.py")):
        inside = path.relative_to(ROOT / package)
        dotted_package = ".".join((package, *inside.parent.parts))
        part = inside.parts[0].removesuffix(".py")
        rows += [(path, part, name) for name in imported_modules(path.read_text(), dotted_package)]
    return rows


GTPO = imports_of("gtpo")
KERNELS = imports_of("gtpo_kernels")
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def test_every_part_of_gtpo_has_its_place_in_the_order() -> None:
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "gtpo").iterdir() if is_part(path)}
    unplaced = sorted(parts - set(HEIGHT) - set(OUTSIDE))
    assert not unplaced, f"add {unplaced} to LAYERS in tests/test_import_direction.py, above all that it imports"


def is_part(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))


def test_gtpo_imports_point_downwards() -> None:
    upward = []
    for path, part, name in GTPO:
        target = name.split(".")[1] if is_within(name, "gtpo") and "." in name else ""
        if part not in HEIGHT or target not in HEIGHT or target == part:
            continue
        if HEIGHT[target] >= HEIGHT[part]:
            upward.append(f"{path.relative_to(ROOT)} imports {name}: {target} is not below {part}")
    assert not upward, "\n".join(upward)


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Within packages too, and by imports in functions; those for type checkers alone (TYPE_CHECKING) aside."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("gtpo", "gtpo_kernels", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imported_modules(without_type_checking(path.read_text()), package)
        # of `from a.b import c` c is a module or stands in one
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys() - {
            module
        }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def without_type_checking(source: str) -> str:
    """
    >>> without_type_checking("import a\\nif TYPE_CHECKING:\\n    import b")
    'import a'
    """
    tree = ast.parse(source)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


def test_nothing_imports_adapters() -> None:
    importers = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, part, name in GTPO + KERNELS
        if part != "adapters" and is_within(name, "gtpo.adapters")
    ]
    assert not importers, "\n".join(importers)


@pytest.mark.parametrize("package", RESTRICTED)
def test_third_party_packages_stay_where_they_belong(package: str) -> None:
    strays = []
    for path, part, name in GTPO:
        if part == "adapters" or not is_within(name, package):
            continue
        allowed = RESTRICTED[package].get(part, ())
        if allowed is not None and not any(is_within(name, module) for module in allowed):
            strays.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not strays, "\n".join(strays)


def test_rewards_credit_and_batch_are_pure() -> None:
    impure = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, part, name in GTPO
        if part in PURE and any(is_within(name, module) for module in IMPURE_IMPORTS)
    ]
    assert not impure, "\n".join(impure)


@pytest.mark.parametrize("package", KERNELS_NEVER)
def test_gtpo_kernels_needs_only_torch(package: str) -> None:
    strays = [f"{path.relative_to(ROOT)} imports {name}" for path, _, name in KERNELS if is_within(name, package)]
    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("module", KERNEL_FILES_ONLY)
def test_heavy_modules_are_imported_by_kernel_files_only(module: str) -> None:
    strays = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, _, name in KERNELS
        if is_within(name, module) and path.name not in KERNEL_FILES_ONLY[module]
    ]
    assert not strays, "\n".join(strays)
