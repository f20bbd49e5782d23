"""Named sets of libraries that cells can import: the files of their distributions, nothing else of site-packages."""

from __future__ import annotations

import importlib.metadata
import os
import re

PROFILES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "math": ("numpy", "sympy"),
    "data": ("numpy", "sympy", "pandas", "scipy"),
}
"""Profile -> distributions, which are imported before the first session under their own names."""

# What they import only when it is used.
_ALSO_IMPORTED = {"numpy": ("numpy.random", "numpy.linalg")}


def check_profile(name: str) -> str:
    """`name`; ValueError when there is no such profile.

    >>> check_profile("maths")
    Traceback (most recent call last):
        ...
    ValueError: profile must be one of ['plain', 'math', 'data'], got 'maths'
    """
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {list(PROFILES)}, got {name!r}")
    return name


# What is done once before the first session, so that no session has to: lazy imports, tables that are built when used.
_WARM_UP = {
    "numpy": "import numpy\nnumpy.linalg.det(numpy.eye(2))\nstr(numpy.arange(3.0))",
    "sympy": (
        "import sympy\nx, y = sympy.symbols('x y')\nsympy.solve(x**2 - 5*x + 6, x)\n"
        "sympy.solve([x + y - 3, x - y], [x, y])\n"
        "str(sympy.expand((x + 1)**3))\nsympy.factor(x**2 - 1)\nsympy.simplify(sympy.sin(x)**2 + sympy.cos(x)**2)\n"
        "sympy.integrate(x**2, x)\nsympy.diff(sympy.exp(x), x)\nsympy.factorint(60)\nsympy.sqrt(8)\nsympy.N(sympy.pi)"
    ),
    "pandas": "import pandas\nstr(pandas.DataFrame({'a': [1, 2]}).groupby('a').sum())",
    "scipy": "import scipy.optimize, scipy.stats, scipy.integrate, scipy.linalg",
}


def warm_up(profile: str) -> str:
    """Code that the fork server runs after its imports; it leaves no variables."""
    return "\n".join(_WARM_UP[name] for name in PROFILES[profile] if name in _WARM_UP)


def modules(profile: str) -> list[str]:
    """What is imported before the first session.

    >>> modules("math")
    ['numpy', 'numpy.random', 'numpy.linalg', 'sympy']
    """
    return [module for name in PROFILES[profile] for module in (name, *_ALSO_IMPORTED.get(name, ()))]


def libraries(profile: str) -> dict[str, str]:
    """File or directory name in site-packages -> path, of the profile's distributions and all that they require.

    ImportError when one of the profile's own is not installed.
    """
    found: dict[str, str] = {}
    waiting, seen = list(PROFILES[profile]), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PROFILES[profile]:
                raise ImportError(f"the sandbox profile {profile!r} needs {name}: pip install {name}") from None
            # Required on another system or Python only.
            continue
        for file in distribution.files or ():
            top = file.parts[0]
            # Not scripts beside site-packages, not metadata, not caches.
            if top != ".." and not top.endswith(".dist-info") and top != "__pycache__":
                found[top] = os.path.realpath(str(distribution.locate_file(top)))
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower())
    return dict(sorted(found.items()))
