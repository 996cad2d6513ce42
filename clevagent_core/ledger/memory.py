"""A ledger in the process's memory: exact under any number of threads and tasks, gone with the process."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, cast

from clevagent_core.baselines import KEPT
from clevagent_core.budgets import Amounts
from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl
from clevagent_core.ledger.account import (
    Account,
    AccountKey,
    Balance,
    Changes,
    Hold,
    Ledger,
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

_EVICT_FROM = 1024
"""The number of accounts from which opening another one looks for some to take out."""


_NOTHING: Amounts = (0, 0, 0, 0, 0, 0)


class MemoryLedger:
    """Accounts in a dictionary, under one lock. See :class:`~clevagent_core.ledger.account.Ledger` for the contract."""

    survives_fork = False

    def __init__(self) -> None:
        """Start with no accounts."""
        self.changes = Changes()
        self._lock = threading.RLock()
        self._accounts: dict[AccountKey, Account] = {}
        self._holds: dict[Hold, None] = {}
        self._evict_at = _EVICT_FROM
        self._samples: dict[str, deque[int]] = {}
        _ledgers.add(self)

    def open(
        self,
        key: AccountKey,
        *,
        ceiling: int,
        keep: int,
        warn_mark: int,
        ends_at: float,
        is_of_run: bool = False,  # noqa: ARG002 - forget() tells in time
    ) -> Account:
        """See :meth:`Ledger.open`."""
        with self._lock:
            account = self._accounts.get(key)
            if account is None:
                account = self._accounts[key] = Account(key, ceiling=ceiling, keep=keep, warn_mark=warn_mark, ends_at=ends_at)
            elif account.granted != ceiling or account.keep != keep:
                raise UsageError(other_ceiling_message(account, ceiling, keep))
            return account

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
        with self._lock:
            is_plain = not wrap_up and _fit_plainly(lines, amounts)
            if not is_plain:
                refusal = refusal_of(lines, amounts, wrap_up=wrap_up)
                if refusal is not None:
                    return refusal
            hold = Hold(lines, amounts, expires_at, owner)
            going_through = iter(lines)
            try:
                for account, unit, _ in going_through:
                    account.held += amounts[unit]
            except BaseException:  # a signal handler's, between two lines: nothing is held
                _move(going_through, amounts, _NOTHING)
                _move(lines, _less(_NOTHING, amounts), _NOTHING)
                raise
            self._holds[hold] = None
            if not is_plain:
                hold.notices = _holding_notices(lines)
            return hold

    def is_news(self, refusal: Refusal) -> bool:
        """See :meth:`Ledger.is_news`."""
        with self._lock:
            return note_told(refusal)

    def settle(self, hold: Hold, amounts: Amounts) -> list[Notice]:
        """See :meth:`Ledger.settle`."""
        with self._lock:
            if hold.state == "settled":
                return []
            notices = self._spend(hold, amounts, "settled")
        self.changes.notify()
        return notices

    def release(self, hold: Hold) -> None:
        """See :meth:`Ledger.release`."""
        with self._lock:
            if hold.state != "open":
                return
            self._spend(hold, _NOTHING, "released")
        self.changes.notify()

    def charge(self, hold: Hold) -> list[Notice]:
        """See :meth:`Ledger.charge`."""
        with self._lock:
            if hold.state != "open":
                return []
            notices = self._spend(hold, hold.amounts, "charged")
        self.changes.notify()
        return notices

    def expire(self, now: float) -> list[tuple[Hold, list[Notice]]]:
        """See :meth:`Ledger.expire`."""
        overdue = [hold for hold in self.holds() if hold.expires_at <= now]
        return [(hold, self.charge(hold)) for hold in overdue]

    def holds(self) -> list[Hold]:
        """See :meth:`Ledger.holds`."""
        with self._lock:
            return list(self._holds)

    def is_held_elsewhere(self) -> bool:
        """See :meth:`Ledger.is_held_elsewhere`."""
        return False

    def top_up(self, account: Account, amount: int) -> Balance:
        """See :meth:`Ledger.top_up`."""
        with self._lock:
            account.ceiling += amount
            account.told = account.warned = False
            balance = balance_of(account)
        self.changes.notify()
        return balance

    def balance(self, account: Account) -> Balance:
        """See :meth:`Ledger.balance`."""
        with self._lock:
            return balance_of(account)

    def remember(self, series: str, value: int, wall: float) -> None:  # noqa: ARG002 - a file wants to know when
        """See :meth:`Ledger.remember`."""
        with self._lock:
            self._samples.setdefault(series, deque(maxlen=KEPT)).append(value)

    def samples(self, series: str) -> list[int]:
        """See :meth:`Ledger.samples`."""
        with self._lock:
            return list(self._samples.get(series, ()))

    def forget(self, accounts: Sequence[Account]) -> None:
        """See :meth:`Ledger.forget`."""
        with self._lock:
            for account in accounts:
                self._forget(account)

    def evict(self, wall: float) -> int:
        """See :meth:`Ledger.evict`."""
        with self._lock:
            if len(self._accounts) < self._evict_at:
                return 0
            gone = _evictable(self._accounts.values(), wall)
            for account in gone:
                account.closed = True
                del self._accounts[account.key]
            # Looked at again once the number has doubled, so that opening an account stays O(1) on average.
            self._evict_at = max(_EVICT_FROM, 2 * len(self._accounts))
            return len(gone)

    def close(self) -> None:
        """See :meth:`Ledger.close`."""
        for hold in self.holds():
            self.charge(hold)

    def _forget(self, account: Account) -> None:
        if self._accounts.get(account.key) is account:
            del self._accounts[account.key]

    def _spend(self, hold: Hold, amounts: Amounts, state: Literal["released", "settled", "charged"]) -> list[Notice]:
        """Take off what is held, and add what was spent. Atomic also where a signal handler raises: then it is done all the same."""
        notices: list[Notice] = []
        held, before = hold.amounts if hold.state == "open" else _NOTHING, hold.charged or _NOTHING
        is_close = False
        going_through = iter(hold.lines)
        try:
            # Nothing is called in it, so that it can be interrupted between two lines only.
            for account, unit, _ in going_through:
                account.held -= held[unit]
                account.spent = spent = account.spent + amounts[unit] - before[unit]
                is_close = is_close or spent >= account.warn_mark or spent > account.ceiling
        except BaseException:
            _move(going_through, _less(_NOTHING, held), _less(amounts, before))
            hold.charged, hold.state = None if state == "released" else amounts, state
            self._holds.pop(hold, None)
            raise
        hold.charged, hold.state = None if state == "released" else amounts, state
        # In a forked child the holds of its parent are not there any more.
        self._holds.pop(hold, None)
        if is_close and state != "released":
            for line in hold.lines:
                notices += spending_notices(line, amounts[line.unit] - before[line.unit])
        return notices

    def _after_fork(self) -> None:
        # The parent may have held the lock. Its accounts go on without us: whoever names one must look it up again, and is
        # told there that a child cannot share them.
        self._lock = threading.RLock()
        self.changes = Changes()
        for account in self._accounts.values():
            account.closed = True
        self._accounts, self._holds = {}, {}


def _move(lines: Iterable[Line], held: Amounts, spent: Amounts) -> None:
    """Add to what is held and to what is spent on every line. For what an exception has interrupted; else this is done in place."""
    for account, unit, _ in lines:
        account.held += held[unit]
        account.spent += spent[unit]


def _less(amounts: Amounts, others: Amounts) -> Amounts:
    return cast("Amounts", tuple(map(int.__sub__, amounts, others)))


def _fit_plainly(lines: Sequence[Line], amounts: Amounts) -> bool:
    """Check the ordinary case at a fraction of the cost: there is room on every account, and none needs a closer look."""
    for account, unit, enforced in lines:
        room = account.ceiling - account.keep - account.spent - account.held
        if amounts[unit] > room or account.closed or not enforced:
            return False
    return True


def _holding_notices(lines: Sequence[Line]) -> list[Notice] | None:
    notices = [notice for line in lines if not line.enforced and (notice := holding_notice(line)) is not None]
    return notices or None


def _evictable(accounts: Iterable[Account], wall: float) -> list[Account]:
    return [account for account in accounts if _is_evictable(account, wall)]


def _is_evictable(account: Account, wall: float) -> bool:
    untouched = account.spent == 0 and account.ceiling == account.granted
    return account.held == 0 and (account.ends_at <= wall or untouched)


_ledgers: weakref.WeakSet[MemoryLedger] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for ledger in list(_ledgers):
        ledger._after_fork()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


class MemoryLedgerProvider:
    """Opens ``init(ledger="memory")``, the default."""

    @hookimpl
    def clevagent_ledger(self, url: str) -> Ledger | None:
        """Answer for ``memory`` only."""
        return MemoryLedger() if url == "memory" else None


def plugin() -> MemoryLedgerProvider:
    """Make the built-in plugin of this module."""
    return MemoryLedgerProvider()
