"""A pytest plugin for langchain-core's tests: its snapshots are of an environment in which langchain is not installed.

Models keep the version of langchain in their metadata where there is one, and 16 tests would fail both ways.
"""

import importlib.metadata

find_version = importlib.metadata.version


def version(name: str) -> str:
    """Return the version of a distribution; langchain counts as missing."""
    if name == "langchain":
        raise importlib.metadata.PackageNotFoundError(name)
    return find_version(name)


importlib.metadata.version = version
import langchain_core.language_models.base  # noqa: E402, F401 - asks once, when it is imported

importlib.metadata.version = find_version
