"""Objects of the user's own, named in a configuration."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_object(reference: str, *, what: str) -> Any:
    """What `reference` names: "package.module:name", or "file.py:name" with a path from the working directory.

    what: what it is, for messages. A file is imported once, under its stem, and finds what lies beside it, as a script
    does.
    Raises ValueError where there is no such file, module or name, or where the module cannot be imported.

    >>> load_object("math:gcd", what="function")(4, 6)
    2
    >>> load_object("math:ggt", what="function")
    Traceback (most recent call last):
    ValueError: function 'math:ggt' must name something in math, which has no 'ggt'
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ValueError(f'{what} must be "package.module:name" or "file.py:name", got {reference!r}')
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    # whatever the module does as it is imported
    except Exception as error:
        raise ValueError(f"{what} {reference!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {reference!r} must name something in {place}, which has no {name!r}")
    return getattr(module, name)


def is_reference(name: str) -> bool:
    """Whether `name` is written as what `load_object` takes, and not as the name of something built in."""
    return ":" in name


def _module_of_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    found = None if loaded is not None else importlib.util.find_spec(path.stem)
    if loaded is not None or (found is not None and found.origin != str(path)):
        raise ImportError(f"there is a module {path.stem!r} already: give {path.name} another name")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look a class's module up by name
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
