"""A ledger in one SQLite file: shared by all processes of a machine, and kept when they end.

Two statements hold a call, two settle it, each pair in one transaction over all of its accounts. What a process holds stands in the
file too, under an *owner* that is alive as long as it keeps a kernel lock on a file of its own. Nothing that a process does can
skip that, not even being killed; and unlike a process id it cannot become somebody else's. Whoever finds no room looks for owners
that are dead, and charges what they held: it may have been sent, and nobody can tell any more.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from clevagent_core.baselines import KEPT
from clevagent_core.budgets import UNITS, USD, Amounts
from clevagent_core.clock import Clock
from clevagent_core.errors import LedgerError, UsageError
from clevagent_core.interrupts import is_interrupt
from clevagent_core.ledger.account import (
    Account,
    AccountKey,
    Balance,
    Changes,
    Hold,
    Line,
    Notice,
    Refusal,
    balance_of,
    holding_notice,
    note_told,
    other_ceiling_message,
    refusal_of,
    spending_notices,
)
from clevagent_core.ledger.database import Database, Execute
from clevagent_core.ledger.owners import is_locked, lock_file, owner_path
from clevagent_core.ledger.statements import (
    CHANGE_CEILING,
    EVICT,
    FIND,
    FORGET_SAMPLES,
    INSERT_ACCOUNT,
    INSERT_HOLD,
    INSERT_OWNER,
    MIGRATIONS,
    MOST,
    REMEMBER,
    SAMPLES,
    TELL,
    TOP_UP,
    reserve_sql,
    select_sql,
    settle_sql,
)
from clevagent_core.money import format_usd

logger = logging.getLogger("clevagent")

_KEPT_S = 3600.0
"""How long accounts are kept whose window is over, and those that nothing was spent from."""
_EVICT_EVERY_S = 60.0
_EVICT_AT_ONCE = 500
"""How many accounts are taken out in one transaction, so that nobody waits long for it."""
_LATEST = 1024
"""How many accounts a process remembers, besides those that its runs use."""
_POLL_S = 0.02
"""How often a process that waits for money looks whether another one has changed the file."""
_RETRY_S = 1.0
"""How often it tries again without such a change: an owner that died told nobody."""


class SqliteAccount(Account):
    """What this process last saw of an account. What counts stands in the file."""

    __slots__ = ("__weakref__", "id")
    id: int


class SqliteHold(Hold):
    """A reservation that stands in the file."""

    __slots__ = ("id", "owner_id", "pid")
    id: int
    owner_id: int
    pid: int
    """The process that made it; in a forked child it is a copy of what is not the child's to close."""


class _Closing(NamedTuple):
    """A hold that is to be closed: what it was, and what is to be spent in its place."""

    hold: SqliteHold
    was: str
    becomes: str
    charged: Amounts | None
    amounts: Amounts


class _Owner(NamedTuple):
    """This process, as the file knows it."""

    id: int
    lock_fd: int


class _PolledChanges(Changes):
    """Tells those who wait also of what other processes change."""

    __slots__ = ("_database", "_poller")

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database
        self._poller: threading.Thread | None = None

    def subscribe(self, listener: Callable[[], object]) -> Callable[[], None]:
        """See :meth:`Changes.subscribe`. While anybody listens, a thread looks at the file."""
        unsubscribe = super().subscribe(listener)
        with self._lock:
            if self._poller is None:
                thread = threading.Thread(target=self._poll, name="clevagent-ledger-changes", daemon=True)
                thread.start()
                self._poller = thread  # not before: a signal handler may raise in start()
        return unsubscribe

    def _poll(self) -> None:
        seen, told_at = None, time.monotonic()
        while True:
            with self._lock:
                if not self._listeners:
                    self._poller = None
                    return
            time.sleep(_POLL_S)
            try:
                version = self._database.read("PRAGMA data_version")
            except LedgerError:
                version = None  # whoever waits tries again, and is told what is wrong
            if version != seen or time.monotonic() - told_at > _RETRY_S:
                seen, told_at = version, time.monotonic()
                self.notify()


class SqliteLedger:
    """Accounts in a file. See :class:`~clevagent_core.ledger.account.Ledger` for the contract.

    After a fork the child is an owner of its own: what the parent holds is not the child's to settle.

    Raises:
        LedgerError: out of every method, when the file cannot be read or written; nothing is held then. A call that was made is
            not lost: it is settled with the next transaction that succeeds.

    """

    survives_fork = True
    kept_s = _KEPT_S

    def __init__(self, path: Path, clock: Clock, agent: str = "") -> None:
        """Open the file, or make it."""
        self._database = _database(path)
        self._clock = clock
        self._agent = agent
        self._accounts: WeakValueDictionary[AccountKey, SqliteAccount] = WeakValueDictionary()
        self._latest: deque[Account] = deque(maxlen=_LATEST)
        """Kept alive, so that a second ceiling is told whether or not anybody still has the account."""
        self._evict_at = clock.wall() + _EVICT_EVERY_S
        self._notices: list[Notice]
        """What closing holds has brought to light, and nobody was told yet."""
        self._owner: _Owner | None
        self._pid: int
        self._is_closing: bool
        self._start_anew()
        _ledgers.add(self)
        with self._database.transaction() as execute:
            self._bury_dead(execute)

    # -- reservations -----------------------------------------------------------------------------------------------------

    def reserve(
        self,
        lines: Sequence[Line],
        amounts: Amounts,
        *,
        expires_at: float,
        owner: object,
        wrap_up: bool = False,
    ) -> Hold | Refusal:
        """See :meth:`Ledger.reserve`."""
        if max(amounts) > MOST:
            amounts = _at_most(amounts)
        hold = SqliteHold(lines, amounts, expires_at=expires_at, owner=owner)
        database = self._database
        with database.lock:
            if self._closing or self._over:
                self._close_waiting()
            me = self._owner or self._enter()
            ids = [line.account.id for line in lines]  # type: ignore[attr-defined]  # open() gave them
            is_usual = not wrap_up and all(line.enforced and not line.account.closed for line in lines)
            try:
                with database.transaction() as execute:
                    if not (is_usual and execute(reserve_sql(len(ids)), (*amounts, *ids, *amounts, *amounts)).rowcount == len(ids)):
                        if is_usual:
                            # Some of them were held; this one goes the long way.
                            execute("ROLLBACK")
                            execute("BEGIN IMMEDIATE")
                        refusal = self._hold_or_refuse(execute, hold, wrap_up=wrap_up)
                        if refusal is not None:
                            return refusal
                    self._last_hold += 1
                    hold.id, hold.owner_id, hold.pid = me.id << 32 | self._last_hold, me.id, self._pid
                    # Before the commit: were a thread interrupted just after it, nobody would know of the hold.
                    self._holds[hold] = None
                    execute(INSERT_HOLD, (hold.id, me.id, ",".join(map(str, ids)), *amounts))
            except BaseException:
                if not database.is_committed:
                    self._holds.pop(hold, None)
                raise
        return hold

    def is_news(self, refusal: Refusal) -> bool:
        """See :meth:`Ledger.is_news`. Of a call that is too large, each process is told."""
        account: Any = refusal.line.account
        with self._database.lock:
            is_news = note_told(refusal)
            if not is_news or refusal.reason == "too_large":
                return is_news
            with self._database.transaction() as execute:
                return bool(execute(TELL, (account.id,)).rowcount)

    def settle(self, hold: Hold, amounts: Amounts) -> list[Notice]:
        """See :meth:`Ledger.settle`."""
        return self._close_hold(hold, "settled", amounts) if hold.state != "settled" else self._closed_before()

    def release(self, hold: Hold) -> None:
        """See :meth:`Ledger.release`."""
        if hold.state == "open":
            self._close_hold(hold, "released", (0, 0, 0, 0, 0, 0))
        else:
            self._closed_before()

    def charge(self, hold: Hold) -> list[Notice]:
        """See :meth:`Ledger.charge`."""
        return self._close_hold(hold, "charged", hold.amounts) if hold.state == "open" else self._closed_before()

    def _closed_before(self) -> list[Notice]:
        if self._closing:
            self._catch_up()  # it was interrupted before it could be written
        return []

    def expire(self, now: float) -> list[tuple[Hold, list[Notice]]]:
        """See :meth:`Ledger.expire`."""
        overdue = [hold for hold in self.holds() if hold.expires_at <= now]
        return [(hold, self.charge(hold)) for hold in overdue]

    def holds(self) -> list[Hold]:
        """See :meth:`Ledger.holds`."""
        with self._database.lock:
            return list(self._holds)

    def is_held_elsewhere(self) -> bool:
        """See :meth:`Ledger.is_held_elsewhere`."""
        me = self._owner.id if self._owner is not None else 0
        return bool(self._database.read("SELECT EXISTS (SELECT 1 FROM hold WHERE owner <> ?)", (me,))[0][0])

    # -- accounts ---------------------------------------------------------------------------------------------------------

    def open(self, key: AccountKey, *, ceiling: int, keep: int, warn_mark: int, ends_at: float, is_of_run: bool = False) -> Account:
        """See :meth:`Ledger.open`.

        A ceiling that is not the one in the file was changed in the code: the new one holds from now on, for every process.
        """
        with self._database.lock:
            account = self._accounts.get(key)
            if account is not None and not account.closed:
                if account.granted != ceiling or account.keep != keep:
                    raise UsageError(other_ceiling_message(account, ceiling, keep))
                return account
            account = SqliteAccount(key, ceiling=ceiling, keep=keep, warn_mark=warn_mark, ends_at=ends_at)
            me = (self._owner or self._enter()).id if is_of_run else None
            ends = None if math.isinf(ends_at) else ends_at
            with self._database.transaction() as execute:
                found = execute(FIND, key).fetchone()
                if found is None:
                    row = (*key, ceiling, ceiling, keep, warn_mark, self._clock.wall(), ends, me)
                    account.id = int(execute(INSERT_ACCOUNT, row).lastrowid or 0)
                else:
                    account.id, granted, kept, opener = found
                    if opener != me:
                        # Of a run that was forked: no process's end is its end.
                        execute("UPDATE account SET owner = NULL WHERE id = ?", (account.id,))
                    if (granted, kept) != (ceiling, keep):
                        execute(CHANGE_CEILING, (ceiling, granted, ceiling, keep, warn_mark, account.id))
                        logger.warning("%s", _changed_message(account, granted))
                self._load(execute, [account])
            self._accounts[key] = account
            if not is_of_run:
                self._latest.append(account)
            return account

    def top_up(self, account: Account, amount: int) -> Balance:
        """See :meth:`Ledger.top_up`."""
        with self._database.transaction() as execute:
            execute(TOP_UP, (amount, account.id))  # type: ignore[attr-defined]  # open() gave it
            self._load(execute, [account])
            if account.closed:
                account.ceiling += amount
                account.told = account.warned = False
            balance = balance_of(account)
        self.changes.notify()
        return balance

    def balance(self, account: Account) -> Balance:
        """See :meth:`Ledger.balance`. Of an account that is not in the file any more, what was last seen."""
        with self._database.lock:
            self._load(self._database.read, [account])
            return balance_of(account)

    def remember(self, series: str, value: int, wall: float) -> None:
        """See :meth:`Ledger.remember`."""
        with self._database.transaction() as execute:
            execute(REMEMBER, (self._agent, series, wall, min(value, MOST)))
            execute(FORGET_SAMPLES, (self._agent, series, self._agent, series, KEPT))

    def samples(self, series: str) -> list[int]:
        """See :meth:`Ledger.samples`."""
        return [value for (value,) in self._database.read(SAMPLES, (self._agent, series, KEPT))][::-1]

    def forget(self, accounts: Sequence[Account]) -> None:
        """See :meth:`Ledger.forget`. They stay in the file for an hour.

        Does not raise: what cannot be written now is written with the next transaction that succeeds.
        """
        if not accounts:
            return
        with self._database.lock:
            for account in accounts:
                if self._accounts.get(account.key) is account:
                    del self._accounts[account.key]
                self._over.append((self._clock.wall(), account.id))  # type: ignore[attr-defined]  # open() gave it
            self._catch_up()

    def evict(self, wall: float) -> int:
        """See :meth:`Ledger.evict`. Looks once a minute, and also for owners that have died."""
        if wall < self._evict_at:
            return 0
        self._evict_at = wall + _EVICT_EVERY_S
        with self._database.transaction() as execute:
            self._bury_dead(execute)
            gone = int(execute(EVICT, (wall - _KEPT_S, wall - self.kept_s, wall - self.kept_s, _EVICT_AT_ONCE)).rowcount)
        if gone == _EVICT_AT_ONCE:
            self._evict_at = wall  # there are more
        return gone

    def close(self) -> None:
        """See :meth:`Ledger.close`. In the middle of a transaction, from a signal handler, it is done at its end.

        Does not raise: what cannot be written now is charged by whoever uses the file next.
        """
        with self._database.lock:
            if self._database.is_inside:
                self._database.after(self.close)
                return
            try:
                for hold in self.holds():
                    self.charge(hold)
                self._close_waiting()
                if self._owner is not None:
                    with self._database.transaction() as execute:
                        self._bury(execute, self._owner.id)
            except LedgerError as error:
                logger.warning("%s What this process still held is charged by the next one that uses the ledger.", error)
            self._leave()
            self._database.close()

    # -- inside: holds ----------------------------------------------------------------------------------------------------

    def _hold_or_refuse(self, execute: Execute, hold: SqliteHold, *, wrap_up: bool) -> Refusal | None:
        """Decide by what the accounts say, and hold if there is room everywhere. The long way: every line is looked at."""
        lines, amounts = hold.lines, hold.amounts
        accounts = [line.account for line in lines]
        self._load(execute, accounts)
        refusal = refusal_of(lines, amounts, wrap_up=wrap_up)
        if refusal is not None and self._bury_dead(execute):
            self._load(execute, accounts)
            refusal = refusal_of(lines, amounts, wrap_up=wrap_up)
        if refusal is not None:
            return refusal
        for line in lines:
            account: Any = line.account
            account.held += amounts[line.unit]
            notice = holding_notice(line)
            if notice is not None:
                hold.notices = [*(hold.notices or ()), notice]
            execute("UPDATE account SET held = held + ? WHERE id = ?", (amounts[line.unit], account.id))
        if hold.notices:
            self._save_marks(execute, accounts)
        return None

    def _close_hold(self, hold: Hold, state: Any, amounts: Amounts) -> list[Notice]:
        with self._database.lock:
            if not isinstance(hold, SqliteHold) or hold.pid != self._pid or hold.state == "settled":
                return []
            self._holds.pop(hold, None)
            if max(amounts) > MOST:
                amounts = _at_most(amounts)
            self._closing.append(_Closing(hold, hold.state, state, hold.charged, amounts))
            hold.state, hold.charged = state, None if state == "released" else amounts
            if self._database.is_inside:
                # The garbage collector's, in the middle of a transaction, whose end takes care of it.
                self._database.after(self._catch_up)
                return []
            self._close_waiting()
            notices, self._notices = self._notices, []
        self.changes.notify()
        return notices

    def _catch_up(self) -> None:
        """Write what waits to be written. What cannot be written now stays in line."""
        if self._database.is_inside:
            self._database.after(self._catch_up)
            return
        with suppress(LedgerError):  # whoever needs the ledger next is told
            with self._database.lock:
                self._close_waiting()
            self.changes.notify()

    def _close_waiting(self) -> None:
        """Close every hold that is to be closed; those that cannot be now stay in line."""
        # Where it is closing already, further out on the same thread, that goes on until nothing waits.
        while (self._closing or self._over) and not self._is_closing:
            try:
                self._is_closing = True
                self._close_all(list(self._closing), list(self._over))
            finally:
                self._is_closing = False

    def _close_all(self, closing: list[_Closing], over: list[tuple[float, int]]) -> None:
        notices = []
        try:
            with self._database.transaction() as execute:
                for one in closing:
                    notices += self._close_one(execute, one)
                for wall_and_id in over:
                    execute("UPDATE account SET over_at = ? WHERE id = ?", wall_and_id)
                # Before the commit: were a thread interrupted just after it, all would be counted twice.
                for _ in closing:
                    self._closing.popleft()
        except BaseException:
            if not self._database.is_committed:
                # Not by a count: an interruption can come in between taking one out and counting it.
                self._closing.extendleft(reversed(_missing(closing, self._closing)))
            raise
        del self._over[: len(over)]
        self._notices += notices

    def _close_one(self, execute: Execute, closing: _Closing) -> list[Notice]:
        hold, amounts = closing.hold, closing.amounts
        lines = hold.lines
        ids = [line.account.id for line in lines]  # type: ignore[attr-defined]  # open() gave them
        held, before = hold.amounts, closing.charged or _ZERO
        if closing.was != "open":
            held = _ZERO
        elif execute("DELETE FROM hold WHERE id = ?", (hold.id,)).rowcount == 0:
            if execute("SELECT 1 FROM owner WHERE id = ?", (hold.owner_id,)).fetchall():
                return []  # closed already, by a thread that was interrupted before it could note that
            # Somebody took this process for dead, and charged what it held.
            held, before = _ZERO, hold.amounts
            if self._owner is not None and self._owner.id == hold.owner_id:
                self._leave()
        spent = amounts if before is _ZERO else tuple(map(int.__sub__, amounts, before))
        execute(settle_sql(len(ids)), (*held, *spent, *ids))
        self._load(execute, [line.account for line in lines])
        notices = []
        for line in lines:
            account = line.account
            added = spent[line.unit]
            if account.closed:
                account.spent += added
            # What is released adds nothing, whatever others have spent meanwhile.
            if closing.becomes != "released" and (account.spent >= account.warn_mark or account.spent > account.ceiling):
                notices += spending_notices(line, added)
        if notices:
            self._save_marks(execute, [line.account for line in lines])
        return notices

    # -- inside: rows -----------------------------------------------------------------------------------------------------

    def _load(self, execute: Callable[..., Any], accounts: Sequence[Any]) -> None:
        """Read accounts; those that are not there any more are marked as closed."""
        by_id = {account.id: account for account in accounts}
        rows = execute(select_sql(len(by_id)), tuple(by_id))
        for id_, ceiling, keep, spent, held, told, warned in rows:
            account = by_id.pop(id_)
            account.ceiling, account.keep, account.spent, account.held = ceiling, keep, spent, held
            account.told, account.warned = bool(told), bool(warned)
        for account in by_id.values():
            account.closed = True

    def _save_marks(self, execute: Execute, accounts: Sequence[Any]) -> None:
        for account in accounts:
            execute("UPDATE account SET told = ?, warned = ? WHERE id = ?", (account.told, account.warned, account.id))

    # -- inside: owners ---------------------------------------------------------------------------------------------------

    def _enter(self) -> _Owner:
        """Make this process known in the file."""
        lock_fd = -1
        path = self._database.path
        try:
            with self._database.transaction() as execute:
                while True:
                    id_ = int(execute(INSERT_OWNER, (os.getpid(), self._agent, self._clock.wall())).lastrowid or 0)
                    path = owner_path(self._database.path, id_)
                    # Locked before anybody can see it: an owner without a locked file is dead.
                    lock_fd = lock_file(path)
                    if lock_fd >= 0:
                        break
                    # A process's that used a file of this name before this one was made.
                    execute("DELETE FROM owner WHERE id = ?", (id_,))
        except BaseException as error:
            if lock_fd >= 0 and not self._database.is_committed:
                path.unlink(missing_ok=True)
                os.close(lock_fd)
            if isinstance(error, OSError) and not is_interrupt(error):
                raise LedgerError(
                    f"The ledger {str(self._database.path)!r} could not be used: the file {str(path)!r}, by whose lock other processes "
                    f"see that this one is alive, cannot be made ({error}). Nothing was let through. Make the folder writable."
                ) from error
            raise
        self._owner = _Owner(id_, lock_fd)
        return self._owner

    def _leave(self) -> None:
        me, self._owner = self._owner, None
        if me is not None:
            with suppress(OSError):  # without its lock the file says nothing
                owner_path(self._database.path, me.id).unlink(missing_ok=True)
            os.close(me.lock_fd)

    def _bury_dead(self, execute: Execute) -> int:
        """Charge what owners held that are not alive any more; tell how many such calls there were."""
        charged = 0
        me = self._owner.id if self._owner is not None else 0
        for id_, pid, agent in execute("SELECT id, pid, agent FROM owner WHERE id <> ?", (me,)).fetchall():
            path = owner_path(self._database.path, id_)
            if is_locked(path):
                continue
            calls, pico = self._bury(execute, id_)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            charged += calls
            if calls:
                logger.warning(
                    "Process %d of agent %r ended with %d calls in flight. They may have been billed, so their upper bounds are "
                    "charged%s.",
                    pid,
                    agent,
                    calls,
                    f": {format_usd(pico)}" if pico else "",
                )
        # Of processes that were taken for dead, and went on: what they settle corrects it, and if they die nobody else would.
        for (id_,) in execute("SELECT DISTINCT owner FROM hold WHERE owner NOT IN (SELECT id FROM owner)").fetchall():
            charged += self._bury(execute, id_)[0]
        return charged

    def _bury(self, execute: Execute, owner: int) -> tuple[int, int]:
        holds = execute(f"SELECT accounts, {', '.join(UNITS)} FROM hold WHERE owner = ?", (owner,)).fetchall()
        for accounts, *amounts in holds:
            ids = [int(number) for number in accounts.split(",") if number]
            execute(settle_sql(len(ids)), (*amounts, *amounts, *ids))
        execute("DELETE FROM hold WHERE owner = ?", (owner,))
        execute("UPDATE account SET over_at = ? WHERE owner = ? AND over_at IS NULL", (self._clock.wall(), owner))
        execute("DELETE FROM owner WHERE id = ?", (owner,))
        return len(holds), sum(amounts[USD] for _, *amounts in holds)

    # -- inside: forks ----------------------------------------------------------------------------------------------------

    def _start_anew(self) -> None:
        self.changes: Changes = _PolledChanges(self._database)
        self._holds: dict[SqliteHold, None] = {}
        self._closing: deque[_Closing] = deque()
        self._over: list[tuple[float, int]] = []
        self._is_closing = False
        self._notices = []
        self._pid = os.getpid()
        self._owner = None
        self._last_hold = 0

    def _after_fork(self) -> None:
        me = self._owner
        self._start_anew()
        if me is not None:
            os.close(me.lock_fd)  # the parent's stays locked: it belongs to the file as the parent has it open


def _missing(all_of_them: Sequence[_Closing], those: Iterable[_Closing]) -> list[_Closing]:
    there = set(map(id, those))
    return [one for one in all_of_them if id(one) not in there]


_ZERO: Amounts = (0, 0, 0, 0, 0, 0)


def _at_most(amounts: Amounts) -> Amounts:
    usd, tokens, input_tokens, output_tokens, llm_calls, tool_calls = (min(amount, MOST) for amount in amounts)
    return usd, tokens, input_tokens, output_tokens, llm_calls, tool_calls


def _changed_message(account: Account, granted: int) -> str:
    key = account.key
    show: Callable[[int], str] = format_usd if key.unit == USD else "{:,}".format
    return (
        f"The ceiling of the budget {key.budget!r} ({UNITS[key.unit]}, {key.key}) was {show(granted)} in the ledger and is now given as "
        f"{show(account.granted)}; that holds from now on, for every process that uses the file. What was spent stays spent."
    )


_ledgers: weakref.WeakSet[SqliteLedger] = weakref.WeakSet()
_databases: WeakValueDictionary[str, Database] = WeakValueDictionary()
_databases_lock = threading.RLock()


def _database(path: Path) -> Database:
    """Find the one connection of this process to a file: two of them could wait for each other on one thread."""
    with _databases_lock:
        name = os.path.realpath(path)
        found = _databases.get(name)
        if found is None or found.is_replaced:
            found = _databases[name] = Database(Path(name), MIGRATIONS)
        return found


def _after_fork_in_child() -> None:
    global _databases_lock  # noqa: PLW0603 - the parent may have held it
    _databases_lock = threading.RLock()
    for ledger in list(_ledgers):
        ledger._after_fork()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)
