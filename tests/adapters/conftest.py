"""Tests of the adapters.  Those in `foreign/` need trainers that `make test-adapters` installs in a venv of its own."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
# Not a skip: `make test` runs everything that it collects.
collect_ignore = [] if os.environ.get("GTPO_TEST_FOREIGN") == "1" else ["foreign"]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python_blocks(page: Path) -> dict[str, Any]:
    """Execute the Python of a page from top to bottom in one scope, which is returned; there must be some."""
    blocks = page.read_text().split("```python\n")[1:]
    assert blocks, f"{page} has no Python"
    scope: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block.split("```")[0], str(page), "exec"), scope)
    return scope
