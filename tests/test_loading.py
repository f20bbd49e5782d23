"""Objects that a configuration names by file or by module."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtpo.loading import load_object


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_is_imported_once_with_what_lies_beside_it(folder: Path) -> None:
    (folder / "own_helper.py").write_text("SIZE = 3\n")
    path = folder / "own_world.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom own_helper import SIZE\n@dataclass\nclass World:\n    a: int = SIZE\n"
    )
    world = load_object(f"{path}:World", what="environment")
    assert world().a == 3 and world.__module__ == "own_world"
    assert load_object(f"{path}:World", what="environment") is world
    assert load_object(f"{path}:SIZE", what="environment") == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "cannot be imported: SyntaxError"),
        ("import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise KeyError('x')\n", "cannot be imported: KeyError: 'x'"),
        ("x = 1\n", "must name something in .* which has no 'f'"),
    ],
)
def test_what_is_wrong_with_a_file(folder: Path, source: str, message: str) -> None:
    path = folder / "own_fault.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=f"^tool .*own_fault.py:f' {message}"):
        load_object(f"{path}:f", what="tool")


def test_a_file_that_would_hide_a_module_is_refused(folder: Path) -> None:
    path = folder / "json.py"
    path.write_text("f = 1\n")
    with pytest.raises(ValueError, match=r"there is a module 'json' already: give json\.py another name"):
        load_object(f"{path}:f", what="tool")
    for reference in ("json", ":f", "json:", ""):
        with pytest.raises(ValueError, match='tool must be "package'):
            load_object(reference, what="tool")
