"""Which file ``init(ledger=...)`` names, and the plugin that opens it."""

from __future__ import annotations

import os
from pathlib import Path

from clevagent_core.clock import Clock
from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl
from clevagent_core.ledger.account import Ledger

_SUFFIXES = (".db", ".sqlite", ".sqlite3")


def path_of(url: str) -> Path | None:
    """Read the path in ``sqlite:///path`` (four slashes for an absolute one), or a path as it is; ``None`` for anything else."""
    name = url.removeprefix("sqlite:///")
    if name == url and not (os.sep in url or url.endswith(_SUFFIXES)):
        return None
    if name == url and "://" in url:
        return None
    return Path(name).expanduser()


class SqliteLedgerProvider:
    """Opens ``init(ledger="sqlite:///path")``. SQLite is imported when one is asked for."""

    @hookimpl
    def clevagent_ledger(self, url: str, clock: Clock, agent: str) -> Ledger | None:
        """Answer for paths, and for URLs that begin with ``sqlite:``."""
        name = url.removeprefix("sqlite:///")
        if url.startswith("sqlite:") and (name == url or not name.strip("/:") or ":memory:" in name):
            raise UsageError(
                f"ledger={url!r} names no file, so nothing could be shared or kept. Write sqlite:///ledger.db (in the working "
                "directory), sqlite:////var/lib/ledger.db (absolute), or the path itself; for accounts in memory, ledger='memory'."
            )
        path = path_of(url)
        if path is None:
            return None
        try:
            from clevagent_core.ledger.sqlite import SqliteLedger  # noqa: PLC0415 - SQLite, and locks that Windows does not have
        except ImportError as error:
            raise UsageError(
                f"ledger={url!r} cannot be opened by this Python ({error}): a ledger that processes share needs SQLite and the file locks "
                "of Linux or macOS. Use ledger='memory', with a ceiling of its own for each process."
            ) from error
        return SqliteLedger(path, clock, agent)


def plugin() -> SqliteLedgerProvider:
    """Make the built-in plugin of this module."""
    return SqliteLedgerProvider()
