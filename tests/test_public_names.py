"""What `import gtpo` offers, and what it does not load."""

import subprocess
import sys

import gtpo


def test_every_public_name_is_there() -> None:
    assert sorted(gtpo._MODULE_OF) == gtpo.__all__
    for name in gtpo.__all__:
        assert getattr(getattr(gtpo, name), "__name__", name) in (name, "Generator")


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, gtpo; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
