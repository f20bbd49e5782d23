"""Settings that every test runs under, and the gate on skips.

With GTPO_FAIL_ON_SKIP=1 a run fails if anything was skipped for another reason than "needs a GPU": a machine that has
all the tools must run all the tests.
"""

import os

# Triton reads this when a kernel file is imported, so it stands before any test module is collected.
if os.environ.get("GTPO_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

ALLOWED_SKIP_REASON = "needs a GPU"

# No deadline: a shared machine is sometimes slow. Derandomized, no database: a gate gives one answer for one commit.
hypothesis.settings.register_profile(
    "gate", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("gate")


def _refused_skips(config: pytest.Config) -> list[str]:
    """A line for each skip, of tests, doctests and whole modules, whose reason does not start with the allowed one."""
    if os.environ.get("GTPO_FAIL_ON_SKIP") != "1":
        return []
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return []
    refused = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_SKIP_REASON):
            refused.append(f"{report.nodeid}: {reason}")
    return refused


# The whole session is looked at from here: the per-test hooks of this file do not see the doctests of the packages.
@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _refused_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    refused = _refused_skips(config)
    if refused:
        terminalreporter.section("skips that fail this run", red=True)
        for line in refused:
            terminalreporter.write_line(line)
