"""The spool: a file in which beats wait while nobody takes them, in their order and as they were made.

SQLite, because a process can be killed at any moment, and because several processes of one agent share the file. What is in it twice,
or sent twice, does no harm: ``(boot_id, seq)`` tells it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from clevagent_core.clock import Clock

logger = logging.getLogger("clevagent")

MOST_ROWS = 10_000
"""How many beats wait at most, of all processes together: at one in 30 s, three and a half days. The oldest go first."""
ORPHANED_S = 600.0
"""After so many seconds what another process has left is sent, also where it seems to be alive: its number may be another's by now."""
_BUSY_S = 1.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS beats (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    boot_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    put_at REAL NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (boot_id, seq)
)
"""

Beats = Sequence[Mapping[str, Any]]


class Spool:
    """The beats of one process in a file that others of its agent may share. Safe to use from any thread; never raises."""

    def __init__(self, path: str, *, boot_id: str, clock: Clock) -> None:
        """Open nothing yet: the file is made when the first beat has to wait."""
        self.path = path
        self._boot_id = boot_id
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._finalizer: weakref.finalize[[], Spool] | None = None
        """Closes the connection of a spool that is dropped without ``close``."""
        self._lock = threading.RLock()
        self._has_told = False

    def put(self, beats: Beats) -> int | None:
        """Keep beats; tell how many older ones had to go because there are too many, or ``None`` where these cannot be written."""
        rows = [(beat["boot_id"], beat["seq"], os.getpid(), self._clock.wall(), json.dumps(beat)) for beat in beats]
        try:
            return self._insert(rows)
        except sqlite3.DatabaseError as error:
            if _is_broken(error) and self._set_aside():
                with contextlib.suppress(sqlite3.Error, OSError):
                    return self._insert(rows)
            self._failed(error)
        except OSError as error:
            self._failed(error)
        return None

    def take(self, limit: int) -> list[dict[str, Any]]:
        """Give the oldest beats of this process and of those that are gone, in the order in which they were put."""
        try:
            return [json.loads(body) for (body,) in self._select("body", "ORDER BY id LIMIT ?", limit)]
        except ValueError:  # somebody else has written in it
            self._set_aside()
            return []

    def done(self, beats: Beats) -> None:
        """Let go of beats that were delivered."""
        try:
            with self._lock, self._opened(create=False) as connection:
                if connection is not None:
                    keys = [(beat["boot_id"], beat["seq"]) for beat in beats]
                    connection.executemany("DELETE FROM beats WHERE boot_id = ? AND seq = ?", keys)
        except (sqlite3.Error, OSError) as error:
            # They are sent once more some time, which does no harm.
            self._failed(error)

    def __len__(self) -> int:
        """Tell how many beats wait that ``take`` would give."""
        return sum(count for (count,) in self._select("COUNT(*)"))

    def close(self) -> None:
        """Close the file."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            if self._connection is not None:
                self._connection.close()
            if self._finalizer is not None:
                self._finalizer.detach()
            self._connection = None

    def after_fork(self, boot_id: str) -> None:
        """Be the spool of a forked child: a connection of the parent must be neither used nor closed there."""
        self._lock = threading.RLock()
        if self._connection is not None:
            _of_parents.append(self._connection)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._connection = None
        self._boot_id = boot_id

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _select(self, what: str, rest: str = "", *parameters: object) -> list[tuple[Any, ...]]:
        """Read of the beats that this process is to send; nothing where they cannot be read."""
        try:
            with self._lock, self._opened(create=False) as connection:
                if connection is None:
                    return []
                boots = [self._boot_id, *self._gone(connection)]
                marks = ", ".join("?" * len(boots))
                query = f"SELECT {what} FROM beats WHERE boot_id IN ({marks}) {rest}"  # noqa: S608 - words of this module only
                found: list[tuple[Any, ...]] = connection.execute(query, (*boots, *parameters)).fetchall()
                return found
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.DatabaseError) and _is_broken(error):
                self._set_aside()
            self._failed(error)
            return []

    def _insert(self, rows: Sequence[tuple[object, ...]]) -> int:
        with self._lock, self._opened(create=True) as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO beats (boot_id, seq, pid, put_at, body) VALUES (?, ?, ?, ?, ?)",
                rows,
            )
            (waiting,) = connection.execute("SELECT COUNT(*) FROM beats").fetchone()
            surplus = max(0, int(waiting) - MOST_ROWS)
            if surplus:
                connection.execute("DELETE FROM beats WHERE id IN (SELECT id FROM beats ORDER BY id LIMIT ?)", (surplus,))
            return surplus

    @contextlib.contextmanager
    def _opened(self, *, create: bool) -> Any:
        """Give the connection in a transaction; ``None`` where there is no file and none is to be made."""
        if self._connection is None:
            if not create and not os.path.exists(self.path):  # noqa: PTH110 - asked before each beat of an outage
                yield None
                return
            self._connection = self._open()
            self._finalizer = weakref.finalize(self, self._connection.close)
            self._finalizer.atexit = False
        with self._connection:
            yield self._connection

    def _open(self) -> sqlite3.Connection:
        folder = os.path.dirname(self.path)  # noqa: PTH120 - as above
        if folder:
            os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103 - as above
        # What a beat tells is for its owner only.
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                connection.execute(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    def _gone(self, connection: sqlite3.Connection) -> list[str]:
        """Find the boots that will not send what they have left."""
        now = self._clock.wall()
        found = connection.execute(
            "SELECT boot_id, pid, MIN(put_at) FROM beats WHERE boot_id != ? GROUP BY boot_id", (self._boot_id,)
        )
        return [boot_id for boot_id, pid, put_at in found if pid == os.getpid() or now - put_at >= ORPHANED_S or not _is_alive(pid)]

    def _set_aside(self) -> bool:
        """Put a file that is no database out of the way; nothing of it is thrown away."""
        self.close()
        try:
            os.replace(self.path, f"{self.path}.broken")  # noqa: PTH105 - as above
        except OSError:
            return False
        logger.warning(
            "The spool %s cannot be read and was renamed to %s.broken; beats that waited in it are not sent. Delete it, or look into it.",
            self.path,
            self.path,
        )
        return True

    def _failed(self, error: Exception) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "The spool %s cannot be used (%s), so heartbeats wait in memory while they cannot be delivered; of more than a thousand the "
                "oldest are lost, and their amounts are in the totals of later ones. Give spool= a path that can be written. (Told once.)",
                self.path,
                error,
            )
        # What a failed transaction has left is unknown: begin with a new connection.
        self.close()


_of_parents: list[sqlite3.Connection] = []
"""Connections of a parent process, kept so that nothing closes them here."""


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    return type(error) is sqlite3.DatabaseError  # malformed, or no database; not full, locked or unreadable


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
