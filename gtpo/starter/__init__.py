"""The project that `gtpo init` writes: an environment, a reward term and a configuration that trains.

`warehouse.py`, `warehouse_rewards.py` and `warehouse.toml` of this folder are copied as they stand.
"""

import shutil
from pathlib import Path

FILES = ("warehouse.py", "warehouse_rewards.py", "warehouse.toml")


def write_starter(folder: str | Path) -> list[Path]:
    """Copies the files into `folder`, which is made. Raises FileExistsError, and writes nothing, where one is there."""
    target = Path(folder)
    paths = [target / name for name in FILES]
    if there := [path for path in paths if path.exists()]:
        raise FileExistsError(f"DIR must not hold {there[0].name} yet, got {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(Path(__file__).parent / path.name, path)
    return paths
