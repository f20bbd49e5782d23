"""Run as `python -m tests.sandbox.rootless TIER [KIND ...]` by a test, as another user: the check of the sandbox."""

import sys

import pytest

from gtpo.sandbox.check import run_check
from tests.sandbox.conftest import without_namespaces

if __name__ == "__main__":
    tier, *kinds = sys.argv[1:]
    if tier == "landlock":
        without_namespaces(pytest.MonkeyPatch())
    sys.exit(not run_check(min_tier=tier, only=kinds))
