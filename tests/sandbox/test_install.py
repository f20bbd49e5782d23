"""`make sandbox-jail` with stand-ins for the programs of a system."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("programs", "user", "code", "said", "done"),
    [
        ("bwrap apt-get", 1000, 0, "installed: bwrap --version", []),
        ("apt-get", 0, 0, "", ["update -qq", "install -y --no-install-recommends bubblewrap"]),
        ("dnf", 0, 0, "", ["install -y bubblewrap"]),
        ("apt-get", 1000, 2, "needs root: sudo apt-get install -y --no-install-recommends bubblewrap", []),
        ("", 0, 2, "neither apt-get nor dnf is here: install the package bubblewrap", []),
    ],
)
def test_the_package_is_installed_or_the_command_is_said(tmp_path, programs, user, code, said, done):
    log = tmp_path / "log"
    stand_ins = dict.fromkeys(programs.split(), f'echo "$@" >> {log}') | {"id": f"echo {user}"}
    if "bwrap" in programs:
        stand_ins["bwrap"] = 'echo "bwrap $*"'
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    # what make itself and its other lines need
    for name in ("sh", "find"):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [shutil.which("make"), "--no-print-directory", "sandbox-jail"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == code and said in result.stdout + result.stderr
    assert (log.read_text().splitlines() if log.exists() else []) == done
