"""What hostile code leaves in a directory that is no file system of its own goes when its session ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gtpo.sandbox import removal

# Directories that only their owners may change, within others like them, and names that the removal could want to use.
LEAVE = """
import os
os.umask(0)
for path in ("sticky", "sticky/inner", "sticky/inner/deep", "sticky/other", ".gtpo-removed-1", ".gtpo-removed-2"):
    os.mkdir(path, 0o1777)
    open(path + "/file", "w").close()
    os.mkdir(path + "/x", 0o1777)
    open(path + "/x/file", "w").close()
"""
REMOVE = """
import os, sys
from gtpo.sandbox import confinement, removal
from gtpo.sandbox.contract import SandboxLimits
uid, box = 12345, sys.argv[1]
os.chown(box, uid, uid)
child = os.fork()
if child == 0:
    os.chdir(box)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    exec(sys.argv[2])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0 and os.listdir(box)
confinement.confine_keeper(confinement.Plan(SandboxLimits(), "none", "", -1, (), uid=uid))
removal.remove_tree(box)
"""


def test_a_keeper_removes_what_another_user_left(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    box = tmp_path / "box"
    box.mkdir(mode=0o700)
    subprocess.run([sys.executable, "-c", REMOVE, str(box), LEAVE], check=True)
    assert not box.exists()


def test_names_that_the_code_has_taken_hinder_no_removal(tmp_path):
    for number in range(1, 4):
        (tmp_path / "box" / f".gtpo-removed-{number}" / "a" / "b").mkdir(parents=True)
    removal.remove_tree(str(tmp_path / "box"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cage", ["landlock"], indirect=True)
def test_nothing_of_a_session_is_left_when_it_ends(cage):
    scratch = Path(cage.pool._server.scratch)
    before = set(os.listdir(scratch))
    (result,) = cage.cells(f"{LEAVE}\nprint(os.path.exists('sticky/inner/deep/x/file'))")
    assert (result.stdout, result.error) == ("True\n", "")
    assert set(os.listdir(scratch)) <= before
