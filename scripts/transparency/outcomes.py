"""A pytest plugin that writes the outcome of each phase of each test to a file, as it happens.

Line by line, so that a run that is ended by its time limit leaves what it has found.
"""

import json
import os

import pytest

FILE = "TRANSPARENCY_OUTCOMES"
"""The environment variable that names the file."""


class Recorder:
    """Appends a line for each report."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the id of the test, the phase, and its outcome."""
        with open(self.path, "a", encoding="utf-8") as file:  # noqa: PTH123 - the suites patch pathlib
            file.write(json.dumps([report.nodeid, report.when, report.outcome]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that hears of all tests; pytest-xdist's workers report to it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(os.environ[FILE]))
