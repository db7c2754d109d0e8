"""The lanes that all kill tests share, and the number of kill points at the end of a test run."""

from __future__ import annotations

import pytest

from crash.lanes import Lanes

USED: list[Lanes] = []


@pytest.fixture(scope="session")
def lanes():
    """Two lanes of a process with torch imported."""
    made = Lanes(2)
    USED.append(made)
    yield made
    made.close()


def summary() -> list[str]:
    """Return a line on what each set of lanes did."""
    lines = []
    for made in USED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.kills.items()))
        lines.append(
            f"kill points: {sum(made.kills.values())} SIGKILLs ({kinds}); "
            f"{made.children} commands, {made.cpu:.0f} s of CPU time"
        )
    return lines


def pytest_sessionfinish(session):
    """Under pytest-xdist, hand the lines to the process that reports (tests/conftest.py)."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["summary"] = summary()


def pytest_terminal_summary(terminalreporter):
    for line in summary():
        terminalreporter.write_line(line)
