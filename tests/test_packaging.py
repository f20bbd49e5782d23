"""The installed distribution: metadata, the compiled module, and the gate on skips."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9._-]+")


def _canonical(requirement: str) -> str:
    match = REQUIREMENT_NAME.match(requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_base_dependencies_are_torch_and_numpy() -> None:
    assert sorted(map(_canonical, PYPROJECT["project"]["dependencies"])) == ["numpy", "torch"]


def test_every_dependency_says_why_it_is_there() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("[build-system]")
    end = lines.index("[project.scripts]")
    dependencies = [line for line in lines[start:end] if re.match(r'\s+"[A-Za-z]', line)]
    declared = PYPROJECT["build-system"]["requires"] + PYPROJECT["project"]["dependencies"]
    declared += [entry for extra in PYPROJECT["project"]["optional-dependencies"].values() for entry in extra]
    assert len(dependencies) == len(declared)
    assert [line for line in dependencies if not re.search(r'",\s+# \S', line)] == []


def test_constraints_pin_every_dependency_but_flash_attn() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9A-Za-z.]*", pin)] == []
    declared = PYPROJECT["project"]["dependencies"]
    declared = declared + [entry for extra in PYPROJECT["project"]["optional-dependencies"].values() for entry in extra]
    # an extra may ask for another one of this distribution
    missing = {_canonical(entry) for entry in declared} - {_canonical(pin) for pin in pins} - {"gtpo"}
    # compiled against whatever CUDA and torch the GPU machine has
    assert missing == {"flash-attn"}


def test_installed_distribution_is_this_tree() -> None:
    assert importlib.metadata.version("gtpo") == PYPROJECT["project"]["version"]
    import gtpo
    import gtpo_kernels

    assert Path(gtpo.__file__).parent == ROOT / "gtpo"
    assert Path(gtpo_kernels.__file__).parent == ROOT / "gtpo_kernels"
    scripts = importlib.metadata.entry_points(group="console_scripts", name="gtpo")
    assert [script.value for script in scripts] == ["gtpo.__main__:main"]


@pytest.mark.parametrize("package", ["gtpo", "gtpo_kernels"])
def test_packages_ship_their_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_importing_gtpo_kernels_is_light() -> None:
    program = (
        "import sys, gtpo_kernels\n"
        "heavy = {'triton', 'transformers', 'flash_attn', 'gtpo', 'gtpo_kernels._cpu'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


SKIPPING_TESTS = """
import pytest

@pytest.mark.skipif(True, reason={reason!r})
def test_skipped():
    assert False

def test_passes():
    assert True
"""


@pytest.mark.parametrize(
    ("fail_on_skip", "reason", "returncode"),
    [("1", "needs bubblewrap", 1), ("1", "needs a GPU", 0), ("", "needs bubblewrap", 0)],
)
def test_skip_gate(tmp_path: Path, fail_on_skip: str, reason: str, returncode: int) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_skipping.py").write_text(SKIPPING_TESTS.format(reason=reason))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"GTPO_FAIL_ON_SKIP": fail_on_skip},
    )
    assert done.returncode == returncode, done.stdout
    assert (f"test_skipped: {reason}" in done.stdout) == (returncode == 1)
