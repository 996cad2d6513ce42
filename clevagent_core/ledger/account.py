"""What every ledger can do. ``memory.py`` keeps accounts in the process; a ledger that processes share obeys the same protocol.

An account belongs to one (budget, unit, key, window). Money moves in three ways, all of them atomic over all accounts of a
call: *reserve* holds the upper bound, *settle* replaces what is held by what it did cost, *release* gives it back. The rules,
for every account and at every moment:

- ``spent >= 0`` and ``held >= 0``;
- ``held`` is the sum of the open holds, ``spent`` the sum of what closed holds were charged;
- no reservation makes ``spent + held`` pass the ceiling, unless its line is not enforced;
- a refused reservation leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from clevagent_core.budgets import UNITS, USD, Amounts
from clevagent_core.money import format_usd


class AccountKey(NamedTuple):
    """What an account is found by."""

    budget: str
    unit: int
    key: str
    window: str


class Account:
    """One account: the ledger's own record. Read it through ``Ledger.balance``, which takes the lock."""

    __slots__ = (
        "ceiling",
        "closed",
        "ends_at",
        "granted",
        "held",
        "keep",
        "key",
        "spent",
        "told",
        "told_too_large",
        "warn_mark",
        "warned",
    )

    def __init__(self, key: AccountKey, *, ceiling: int, keep: int, warn_mark: int, ends_at: float) -> None:
        """Open an account that nothing was spent from. Amounts are in the key's unit."""
        self.key = key
        self.granted = ceiling
        """The ceiling as the budget has it, without what was topped up."""
        self.ceiling = ceiling
        self.keep = keep
        self.spent = 0
        self.held = 0
        self.closed = False
        """Taken out of the ledger: what still names it must look it up again."""
        self.told = False
        """Whether observers heard that it is used up; false again once it was topped up, or reset."""
        self.told_too_large = 0
        """The ceiling of which this process was told that one call is larger than all of it."""
        self.warned = False
        self.warn_mark = warn_mark
        self.ends_at = ends_at


class Line(NamedTuple):
    """One account that a call counts against."""

    account: Account
    unit: int
    """Which of the call's amounts counts: an index into ``UNITS``."""
    enforced: bool
    """Whether a call that does not fit is refused, or only told."""


@dataclass(frozen=True, slots=True)
class Balance:
    """An account at one moment, in its own unit."""

    key: AccountKey
    ceiling: int
    keep: int
    spent: int
    held: int

    @property
    def free(self) -> int:
        """What a call may still reserve; never negative."""
        return max(0, self.ceiling - self.keep - self.spent - self.held)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left, but for a wrap-up."""
        return self.spent >= self.ceiling - self.keep


class Refusal(NamedTuple):
    """The reservation did not fit, and nothing was held."""

    line: Line
    balance: Balance
    """The account that had no room, as it was at that moment."""
    needed: int
    reason: Literal["exhausted", "too_large", "busy", "latched"]
    """Why: what is left is too little; the call is larger than the whole ceiling; the room is merely held by calls in flight; or the
    run was refused before, which the run tree knows (``Run.latches``), not the ledger."""


class Notice(NamedTuple):
    """Something to tell about an account: it crossed its warning mark, or its ceiling."""

    kind: Literal["warning", "overshoot"]
    balance: Balance
    enforced: bool
    """Whether calls that do not fit are refused."""


def other_ceiling_message(account: Account, ceiling: int, keep: int) -> str:
    """Say that one account was given two ceilings."""
    key = account.key
    return (
        f"The budget {key.budget!r} is already in use for {key.key!r} with a ceiling of "
        f"{_show(key, account.granted, account.keep)}, and is now given with {_show(key, ceiling, keep)}. "
        "One account cannot have two ceilings: give the budgets different names, or raise the ceiling with top_up()."
    )


def _show(key: AccountKey, ceiling: int, keep: int) -> str:
    if key.unit != USD:
        return f"{ceiling:,} {UNITS[key.unit].replace('_', ' ')}"
    return format_usd(ceiling) + (f" (keeping {format_usd(keep)})" if keep else "")


def balance_of(account: Account) -> Balance:
    """Read what the record says. Under the ledger's lock."""
    return Balance(account.key, account.ceiling, account.keep, account.spent, account.held)


def refusal_of(lines: Sequence[Line], amounts: Amounts, *, wrap_up: bool) -> Refusal | None:
    """Tell which account has no room for ``amounts``. Under the ledger's lock. See ``Ledger.reserve``.

    Raises:
        StaleAccount: one of the accounts was taken out of the ledger.

    """
    busy: Refusal | None = None
    for line in lines:
        account, unit, enforced = line
        if account.closed:
            raise StaleAccount(account.key)
        needed = amounts[unit]
        # What a call does not use, it cannot pass: a ceiling that usage has overshot refuses only what adds to it.
        if not enforced or not needed:
            continue
        room = account.ceiling if wrap_up else account.ceiling - account.keep
        spent = account.spent
        if spent + account.held + needed <= room:
            continue
        if spent + needed > room:
            # Where nothing is left at all, the size of the call makes no difference.
            reason: Literal["exhausted", "too_large"] = "too_large" if needed > room > spent else "exhausted"
            return Refusal(line, balance_of(account), needed, reason)
        busy = busy or Refusal(line, balance_of(account), needed, "busy")
    return busy


def note_told(refusal: Refusal) -> bool:
    """Take note that a refusal is told, and answer whether that is news. Under the ledger's lock. See ``Ledger.is_news``."""
    account, ceiling = refusal.line.account, refusal.balance.ceiling
    if refusal.reason == "too_large":
        was_told = account.told_too_large == ceiling
        account.told_too_large = ceiling
    else:
        was_told, account.told = account.told, True
    return not was_told


def holding_notice(line: Line) -> Notice | None:
    """Tell, once, that an account whose ceiling is not enforced would pass it. After what is held was added."""
    account = line.account
    if line.enforced or account.told or account.spent + account.held <= account.ceiling:
        return None
    account.told = True
    return Notice("overshoot", balance_of(account), enforced=False)


def spending_notices(line: Line, added: int) -> list[Notice]:
    """Tell, once, that an account crossed its warning mark or its ceiling. After the spending was ``added``."""
    account, _, enforced = line
    notices: list[Notice] = []
    if account.spent >= account.warn_mark and not account.warned:
        account.warned = True
        notices.append(Notice("warning", balance_of(account), enforced))
    # That something was refused is another thing than that more was billed than the ceiling.
    is_news = not account.told or (enforced and account.spent - added <= account.ceiling)
    if account.spent > account.ceiling and is_news:
        account.told = True
        notices.append(Notice("overshoot", balance_of(account), enforced))
    return notices


class Hold:
    """A reservation. It is open until it is settled, released, or charged."""

    __slots__ = ("amounts", "charged", "expires_at", "lines", "notices", "owner", "state")

    amounts: Amounts
    """What is held on every line, by unit."""
    charged: Amounts | None
    """What was spent in its place, once it was charged or settled."""
    expires_at: float
    """When (monotonic seconds) it is charged if nobody has told what became of it."""
    lines: Sequence[Line]
    notices: list[Notice] | None
    """What is to be told about accounts whose ceiling is not enforced."""
    owner: object
    """Whoever made the reservation, so that an expired one can be told."""
    state: Literal["open", "released", "charged", "settled"]

    def __init__(self, lines: Sequence[Line], amounts: Amounts, expires_at: float, owner: object) -> None:
        """Made by ``Ledger.reserve`` only."""
        self.lines = lines
        self.amounts = amounts
        self.charged = None
        self.expires_at = expires_at
        self.owner = owner
        self.state = "open"
        self.notices = None


class StaleAccount(Exception):
    """A line names an account that was taken out of the ledger meanwhile."""


class Changes:
    """Tells those who wait that held money has come back. Safe to use from any thread."""

    __slots__ = ("_listeners", "_lock")

    def __init__(self) -> None:
        """Nobody listens yet."""
        self._lock = threading.RLock()
        self._listeners: tuple[Callable[[], object], ...] = ()

    def subscribe(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call ``listener`` (quick, must not raise) after each change; returns what ends that."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def notify(self) -> None:
        """Call every listener."""
        for listener in self._listeners:
            listener()


class Ledger(Protocol):
    """Keeps accounts. Every method is safe from any thread and takes effect at once or not at all."""

    changes: Changes
    survives_fork: bool
    """Whether a forked child and its parent see each other's spending."""

    def open(self, key: AccountKey, *, ceiling: int, keep: int, warn_mark: int, ends_at: float, is_of_run: bool = False) -> Account:
        """Find an account, or open it.

        Args:
            key: what it is found by.
            ceiling: what it never lets be passed.
            keep: the part of it that only a wrap-up may use.
            warn_mark: the spending that is told, once.
            ends_at: when (seconds since 1970) its window is over; infinity for never.
            is_of_run: whether its window is one run of this process, with which it ends.

        Raises:
            UsageError: the account is open in this process with another ceiling: two budgets with one name and different limits.
            LedgerError: as every method of a ledger that is kept in a file: it cannot be read or written.

        """
        ...

    def reserve(
        self,
        lines: Sequence[Line],
        amounts: Amounts,
        *,
        expires_at: float,
        owner: object,
        wrap_up: bool = False,
    ) -> Hold | Refusal:
        """Hold ``amounts`` on every line, or on none. A refusal leaves nothing behind.

        Args:
            lines: the accounts; an account that has no room refuses, unless its line is not enforced.
            amounts: what the call could cost at most.
            expires_at: when (monotonic seconds) an open hold is charged, because nobody can tell any more what became of it.
            owner: kept on the hold.
            wrap_up: may use what accounts keep back.

        Raises:
            StaleAccount: look the lines up again.

        """
        ...

    def is_news(self, refusal: Refusal) -> bool:
        """Take note that a refusal is told, and answer whether it is the first of its account since that was topped up or reset."""
        ...

    def settle(self, hold: Hold, amounts: Amounts) -> list[Notice]:
        """Replace what is held by what the call did cost. Once only; it also corrects a hold that was released or charged."""
        ...

    def release(self, hold: Hold) -> None:
        """Give back what is held: the call was not sent. Does nothing to a hold that is no longer open."""
        ...

    def charge(self, hold: Hold) -> list[Notice]:
        """Spend all that is held: the call may have been sent, and what it cost is unknown. Only on an open hold."""
        ...

    def expire(self, now: float) -> list[tuple[Hold, list[Notice]]]:
        """Charge every open hold whose time is over at ``now`` (monotonic seconds)."""
        ...

    def holds(self) -> list[Hold]:
        """The open holds of this process."""
        ...

    def is_held_elsewhere(self) -> bool:
        """Whether other processes hold anything."""
        ...

    def top_up(self, account: Account, amount: int) -> Balance:
        """Raise the ceiling by ``amount``; what is refused or close to the ceiling then is news again."""
        ...

    def balance(self, account: Account) -> Balance:
        """Read an account."""
        ...

    def remember(self, series: str, value: int, wall: float) -> None:
        """Keep a sample of what the agent does; the latest hundred of each series are kept."""
        ...

    def samples(self, series: str) -> list[int]:
        """Give the samples of a series, oldest first."""
        ...

    def forget(self, accounts: Sequence[Account]) -> None:
        """Take out accounts that only their own run still names; that run can go on using them."""
        ...

    def evict(self, wall: float) -> int:
        """Take out accounts whose window is over at ``wall``, and idle ones that nothing was ever spent from. Tells how many."""
        ...

    def close(self) -> None:
        """The watchdog has shut down: charge what this process still holds. Accounts can still be read."""
        ...
