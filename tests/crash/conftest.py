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


def pytest_terminal_summary(terminalreporter):
    for made in USED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(made.kills.items()))
        terminalreporter.write_line(
            f"kill points: {sum(made.kills.values())} SIGKILLs ({kinds}); "
            f"{made.children} commands, {made.cpu:.0f} s of CPU time"
        )
