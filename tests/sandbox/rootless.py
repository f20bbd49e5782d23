"""Run as `python -m tests.sandbox.rootless JAIL [KIND ...]` by a test, as another user: the check of the sandbox."""

import sys

import pytest

from gtpo.sandbox.abuse.check import run_check
from tests.sandbox.conftest import only_jail

if __name__ == "__main__":
    jail, *kinds = sys.argv[1:]
    only_jail(pytest.MonkeyPatch(), jail)
    sys.exit(not run_check(min_tier="landlock", only=kinds))
