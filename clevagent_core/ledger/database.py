"""One SQLite file that threads and processes of one machine share: transactions, fairness, forks, checkpoints, clear errors.

How it is driven, and why (measured with SQLite 3.40):

- WAL with ``synchronous=NORMAL``: a commit is a write without an fsync. A killed process loses nothing; a power failure may lose
  the last commits.
- Every transaction begins with ``BEGIN IMMEDIATE``. One that reads first and writes later fails as soon as another has written.
- Around it a ``flock`` on a file of its own. SQLite's waiting is a sleep that grows, by which some of several busy processes
  starve; the kernel wakes those that wait for a ``flock`` one after another.
- Automatic checkpoints are off: a thread makes them, so that no call waits for one.
- SQLite's connections must not cross a fork: a connection that the child makes would believe that the locks of the parent's are its
  own. So the parent's is closed before, and both make a new one after.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clevagent_core.errors import LedgerError
from clevagent_core.interrupts import is_interrupt

BUSY_S = 5.0
"""How long SQLite waits for a program that does not take our lock: a backup, a shell."""
_CHECKPOINT_EVERY = 1000
"""After how many commits of this process a checkpoint is made."""
_WAL_PAGES = 4000
"""From how many pages on writers are held up for the end of a checkpoint, so that the log begins anew: 16 MB."""
APPLICATION_ID = 0x436C6576
"""Written into the file's header, so that another program's database is not taken for a ledger."""

Execute = Callable[..., sqlite3.Cursor]


class Database:
    """A connection of this process to one file, and the lock of its transactions. ``with database.transaction() as execute:`` is one.

    Safe from any thread. What fails is raised as ``LedgerError``, and nothing of the transaction is kept.
    """

    _fd = -1

    def __init__(self, path: Path, migrations: tuple[str, ...]) -> None:
        """Open ``path``, make it if it does not exist, and bring it up to date.

        Raises:
            LedgerError: it cannot be opened, is no ledger, or was made by a newer version.

        """
        self.path = Path(os.path.realpath(path))
        """Where the file is: the locks stand beside it, not beside a link to it."""
        self.lock = threading.RLock()
        """Held during every transaction. Reentrant, because the garbage collector may settle a call at any allocation."""
        self.is_inside = False
        """Whether a transaction is open: whoever then comes in on the same thread must not begin another."""
        self.is_committed = False
        """Whether the latest transaction was committed; what interrupts a thread can come just after it was."""
        self.identity: tuple[int, int] | None = None
        """Device and inode of the file that is open; another one means that it was deleted and made anew."""
        self._migrations = migrations
        self._connection: sqlite3.Connection | None = None
        self._finalizer: weakref.finalize[[], Database] | None = None
        """Closes the connection of a database that is dropped without ``close``; ``__del__`` could run after the connection's own."""
        self._execute: Execute
        self._commits = 0
        self._later: list[Callable[[], object]] = []
        self._checkpointer = _Checkpointer(self)
        with self.lock:
            self._open()
        with _fork_lock:
            _databases.add(self)

    def __del__(self) -> None:
        """Give the lock's descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)

    # -- transactions -----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        """Begin a transaction that writes, waiting for its turn. Commit it, or take everything back if something is raised.

        A generator, because a signal can interrupt an ``__exit__`` before its first line; a generator that was left behind is
        closed all the same.
        """
        later: list[Callable[[], object]] = []
        try:
            with self.lock:
                self._refuse_inside()
                is_begun = is_done = False
                try:
                    self.is_inside, self.is_committed = True, False
                    self._open()
                    fcntl.flock(self._fd, fcntl.LOCK_EX)
                    self._execute("BEGIN IMMEDIATE")
                    is_begun = True
                    yield self._execute
                    is_done = True
                    self._execute("COMMIT")
                    self.is_committed = True
                except BaseException as error:
                    is_trouble = isinstance(error, sqlite3.Error) or (isinstance(error, OSError) and not is_begun)
                    is_trouble = is_trouble and not is_interrupt(error)  # a TimeoutError is an OSError, too
                    # Interrupted just after the commit, there is nothing left to take back.
                    is_taken_back = self._roll_back()
                    self.is_committed = is_done and not is_trouble and not is_taken_back
                    if is_trouble:
                        raise explained(error, self.path) from error  # type: ignore[arg-type]  # what is_trouble says
                    raise
                finally:
                    self.is_inside = False
                    try:  # noqa: SIM105 - nothing that a signal can interrupt
                        fcntl.flock(self._fd, fcntl.LOCK_UN)
                    except (OSError, ValueError):
                        pass  # it could not be opened, or a fork has closed it
                    later, self._later = self._later, later
                self._commits += 1
                if self._commits >= _CHECKPOINT_EVERY:
                    self._commits = 0
                    self._checkpointer.poke()
        finally:
            for work in later:
                work()

    def after(self, work: Callable[[], object]) -> None:
        """Do ``work`` (which must not raise) once the transaction is over in whose middle this thread is."""
        self._later.append(work)

    def read(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """Read outside of a transaction; inside one on the same thread, as it stands there."""
        with self.lock:
            if not self.is_inside:
                self._open()
            elif self._connection is None:
                self._refuse_inside()
            try:
                # With a cursor of its own: the garbage collector may read while a statement of the transaction is running.
                return self._connection.execute(sql, parameters).fetchall()  # type: ignore[union-attr]  # it is open
            except sqlite3.Error as error:
                raise explained(error, self.path) from error

    def close(self) -> None:
        """Close the connection; the next transaction opens it again."""
        with self.lock:
            if self.is_inside:
                self.after(self.close)
                return
            self._close()

    def _close(self) -> None:
        with self.lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                # The last one to close makes a checkpoint, which can fail like every write; the log is then kept for the next.
                with suppress(sqlite3.Error):
                    connection.close()
            if self._finalizer is not None:
                self._finalizer.detach()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    # -- opening ----------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            found = self._identity_now()
        except OSError as error:
            if is_interrupt(error):
                raise
            raise explained(error, self.path) from error
        if self._connection is not None and found == self.identity:
            return
        if self.identity not in (None, found):
            raise LedgerError(
                f"The ledger {str(self.path)!r} was deleted or replaced while this process used it. Who starts now counts in another "
                "file, so no ceiling would hold, and nothing was let through. Start this process anew; to begin from zero, use "
                "`clevagent ledger reset`, which no process minds."
            )
        try:
            self._make_file()
            self._fd = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                self._connection = connect(self.path)
                self._finalizer = weakref.finalize(self, self._connection.close)
                self._finalizer.atexit = False  # a daemon thread may still use it
                self._execute = self._connection.cursor().execute
                self._migrate(self._connection)
                self.identity = self._identity_now()
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        except (sqlite3.Error, OSError) as error:
            self._close()
            if is_interrupt(error):
                raise
            raise explained(error, self.path) from error
        except BaseException:
            self._close()
            raise

    @property
    def is_replaced(self) -> bool:
        """Whether the file that was open is not the one that is there now."""
        try:
            return self.identity not in (None, self._identity_now())
        except OSError:
            return False

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)  # noqa: PTH116 - with every transaction, and a Path takes three times as long
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _make_file(self) -> None:
        # Never opened once SQLite has it: closing any descriptor of a file drops all POSIX locks of the process on it.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        newest = len(self._migrations)
        if version > newest:
            raise LedgerError(
                f"The ledger {str(self.path)!r} was made by a newer ClevAgent (its version is {version}, this one knows {newest}), so it "
                "was not touched. Install that version here too, or give this program a ledger of its own."
            )
        for number, script in enumerate(self._migrations[version:], start=version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT")

    def _refuse_inside(self) -> None:
        if self.is_inside:
            raise LedgerError(
                f"The ledger {str(self.path)!r} was used again in the middle of a transaction, by a finalizer or a signal handler, so "
                "nothing was let through. Make calls elsewhere than there."
            )

    def _unlock(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _roll_back(self) -> bool:
        connection = self._connection
        # A statement that failed for want of disk space has rolled back already.
        if connection is None or not connection.in_transaction:
            return False
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        return True

    # -- what is done beside transactions ---------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold up every writer of the machine."""
        with self.lock:
            self._open()
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                yield
            finally:
                self._unlock()

    def before_fork(self) -> None:
        """Let no transaction and no connection cross the fork."""
        self._checkpointer.lock.acquire()
        self.lock.acquire()
        self._close()

    def after_fork_in_parent(self) -> None:
        """Go on; the next transaction connects again."""
        self.lock.release()
        self._checkpointer.lock.release()

    def after_fork_in_child(self) -> None:
        """Start with fresh locks; the next transaction connects again."""
        self.lock = threading.RLock()
        self.is_inside = False
        self._later.clear()
        self._close()  # not closed before where a server forks without telling Python first
        self._checkpointer = _Checkpointer(self)


class _Checkpointer:
    """A daemon thread that moves what was committed from the log into the file, so that no call has to."""

    def __init__(self, database: Database) -> None:
        self.lock = threading.RLock()
        """Held while a checkpoint is made."""
        self._database = weakref.ref(database)
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def poke(self) -> None:
        self._wanted.set()
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="clevagent-ledger", daemon=True)
            thread.start()
            self._thread = thread  # not before: a signal handler may raise in start()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            database = self._database()
            if database is None:
                return
            with self.lock, suppress(sqlite3.Error, LedgerError):  # whatever is wrong with the disk, the next transaction tells
                _checkpoint(database)
            del database


def _checkpoint(database: Database) -> None:
    connection = connect(database.path)
    try:
        _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages > _WAL_PAGES:
            # Only a log that is in the file to its last page begins anew, and writers who never rest let that never be.
            with database.turn():
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    finally:
        connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection in autocommit mode, as this module drives it; never makes the file."""
    url = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(url, timeout=BUSY_S, isolation_level=None, check_same_thread=False, uri=True)
    try:
        _refuse_other_program(path, connection)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        _refuse_other_mode(path, mode)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_other_program(path: Path, connection: sqlite3.Connection) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application == APPLICATION_ID:
        return
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application or version or connection.execute("SELECT 1 FROM sqlite_master").fetchall():
        raise LedgerError(
            f"{str(path)!r} is a database of another program, not a ledger, so nothing was written to it. Give ledger= the "
            "path of a file that ClevAgent may make."
        )


def _refuse_other_mode(path: Path, mode: str) -> None:
    if mode != "wal":
        raise LedgerError(
            f"{str(path)!r} cannot be shared by processes: SQLite's write-ahead log does not work there (the journal mode stays "
            f"{mode!r}). Put the ledger on a disk of this machine, not on a network drive."
        )


_REASONS = {
    "SQLITE_BUSY": (
        f"another program has held it locked for {BUSY_S:g} s",
        "End that program (a backup, an open sqlite3 shell), then try again",
    ),
    "SQLITE_FULL": ("its disk is full", "Make room on the disk"),
    "SQLITE_READONLY": ("it cannot be written", "Make the file and its folder writable for this user, or give another path"),
    "SQLITE_CANTOPEN": (
        "it cannot be opened",
        "Make sure that its folder exists and that this user may write there; an absolute path in a URL has four slashes: sqlite:////var/lib/ledger.db",
    ),
    "SQLITE_CORRUPT": ("it is damaged", "Keep a copy, put a backup in its place, or delete it: all totals then start from zero"),
    "SQLITE_NOTADB": ("it is no SQLite database", "Give the path of a ledger, or of a file that does not exist yet"),
    "SQLITE_IOERR": ("its disk failed or is full", "Look at the disk and at the system's log"),
}


def explained(error: Exception, path: Path) -> LedgerError:
    """Say what is wrong with the ledger, what it means and what to do."""
    name = getattr(error, "sqlite_errorname", None) or ("SQLITE_CANTOPEN" if isinstance(error, OSError) else "")
    known = next((known for known in _REASONS if name.startswith(known)), None)
    reason, remedy = _REASONS[known] if known is not None else ("it cannot be used", "Look at the file and its disk")
    return LedgerError(
        f"The ledger {str(path)!r} could not be used: {reason} ({error}). What is spent could not be counted, so nothing was let "
        f"through. {remedy}."
    )


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_fork_lock = threading.RLock()
"""Held during a fork: of two threads that fork at once, each must let go of what it took itself."""
_forking: list[list[Database]] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking.append([])
    for database in list(_databases):
        database.before_fork()
        _forking[-1].append(database)


def _after_fork_in_parent() -> None:
    for database in reversed(_forking.pop()):
        database.after_fork_in_parent()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock  # noqa: PLW0603 - another thread of the parent may have waited for it
    _fork_lock = threading.RLock()
    _forking.clear()
    for database in list(_databases):
        database.after_fork_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
