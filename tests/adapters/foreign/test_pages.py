"""The Python in the pages of the trainers that are installed here."""

import pytest

from tests.adapters.conftest import ROOT, run_python_blocks


@pytest.mark.parametrize("page", ["verl", "skyrl", "openrlhf", "areal", "tinker_cookbook"])
def test_the_page_runs(page: str) -> None:
    run_python_blocks(ROOT / "docs" / "adapters" / f"{page}.md")
