"""Any order of operations on a ledger, beside a model of the contract in ``ledger/account.py`` that predicts every balance."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from clevagent.testing import FakeClock
from clevagent_core.budgets import UNITS, USD, Amounts
from clevagent_core.errors import UsageError
from clevagent_core.ledger.account import Account, AccountKey, Balance, Hold, Ledger, Line, Notice, Refusal, StaleAccount
from clevagent_core.ledger.memory import MemoryLedger
from clevagent_core.ledger.sqlite import SqliteLedger


class EagerMemoryLedger(MemoryLedger):
    """Looks for accounts to take out each time, not only when there are many."""

    def evict(self, wall: float) -> int:
        self._evict_at = 0
        return super().evict(wall)


class EagerSqliteLedger(SqliteLedger):
    """Looks each time, and keeps nothing for later."""

    kept_s = 0.0

    def evict(self, wall: float) -> int:
        self._evict_at = -math.inf
        return super().evict(wall)


def _make_sqlite() -> Ledger:
    folder = Path(tempfile.mkdtemp(prefix="clevagent-ledger-"))
    _folders.append(folder)
    return EagerSqliteLedger(folder / "ledger.db", FakeClock(datetime(1970, 1, 1, tzinfo=UTC)))


_folders: list[Path] = []


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    while _folders:
        shutil.rmtree(_folders.pop())


LEDGERS: dict[str, Callable[[], Ledger]] = {"memory": EagerMemoryLedger, "sqlite": _make_sqlite}
"""Every ledger is put through the same. Its ``evict`` must look at every account, each time."""
SLOW_IN_A_FILE = [
    pytest.param(make, id=name, marks=[pytest.mark.slow] if name == "sqlite" else []) for name, make in LEDGERS.items()
]

GIVEN = {"small": (5, 0), "kept": (20, 8), "plain": (12, 0), "other": (30, 1)}
"""Budgets: the ceiling, and what is kept of it (in the unit USD only)."""
WINDOW_S = 100.0

AMOUNTS = st.tuples(*[st.one_of(st.just(0), st.integers(0, 4), st.integers(0, 14))] * len(UNITS))
KEYS = st.builds(
    AccountKey,
    budget=st.sampled_from(sorted(GIVEN)),
    unit=st.sampled_from([0, 1, 4]),
    key=st.sampled_from(["all", "tenant=a"]),
    window=st.sampled_from(["", "0", "1"]),
)
INDEX = st.integers(0, 10**6)
"""Picks one of what there is, whatever there is."""


@dataclass(eq=False)
class Expected:
    """What the contract says of one account."""

    real: Account
    key: AccountKey
    granted: int
    ceiling: int
    keep: int
    warn_mark: int
    ends_at: float
    spent: int = 0
    held: int = 0
    told_too_large: int = 0
    told: bool = False
    warned: bool = False
    is_closed: bool = False
    is_strict: bool = True
    """Whether everything that counted against it was enforced, and cost no more than was held for it."""

    def balance(self) -> Balance:
        return Balance(self.key, self.ceiling, self.keep, self.spent, self.held)


@dataclass(eq=False)
class ExpectedHold:
    """What the contract says of one reservation."""

    real: Hold
    lines: list[tuple[Expected, int, bool]]
    amounts: Amounts
    expires_at: float
    state: str = "open"
    charged: Amounts | None = None
    notices: list[tuple[str, AccountKey]] = field(default_factory=list)


def heard(notices: Sequence[Notice] | None) -> list[tuple[str, AccountKey]]:
    return [(notice.kind, notice.balance.key) for notice in notices or ()]


class LedgerMachine(RuleBasedStateMachine):
    """Does to a ledger whatever can be done to it."""

    def __init__(self, make_ledger: Callable[[], Ledger]) -> None:
        super().__init__()
        self.ledger = make_ledger()
        self.accounts: list[Expected] = []
        """All that were ever opened; those that were forgotten or evicted too."""
        self.open_now: dict[AccountKey, Expected] = {}
        self.holds: list[ExpectedHold] = []
        self.now = 0.0
        self.taken = 0
        self.given_back = 0
        self.changes = 0
        self.ledger.changes.subscribe(self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def _pick(self, index: int) -> ExpectedHold:
        return self.holds[index % len(self.holds)]

    # -- accounts ---------------------------------------------------------------------------------------------------------

    @initialize(keys=st.lists(KEYS, min_size=2, max_size=4, unique=True))
    def begin(self, keys: list[AccountKey]) -> None:
        for key in keys:
            self.open_account(key)

    @rule(key=KEYS)
    def open_account(self, key: AccountKey) -> None:
        """A new window is a new key: it begins at zero."""
        ceiling, keep = GIVEN[key.budget]
        given: dict[str, Any] = {
            "ceiling": ceiling,
            "keep": keep if key.unit == USD else 0,
            "warn_mark": ceiling * 8 // 10,
            "ends_at": WINDOW_S * (1 + int(key.window)) if key.window else math.inf,
        }
        real = self.ledger.open(key, **given)
        known = self.open_now.get(key)
        if known is not None:
            assert real is known.real
            return
        assert all(real is not other.real for other in self.accounts)
        self.open_now[key] = Expected(real, key, granted=ceiling, **given)
        self.accounts.append(self.open_now[key])

    @precondition(lambda self: self.open_now)
    @rule(index=INDEX, other=st.booleans())
    def open_with_another_ceiling(self, index: int, *, other: bool) -> None:
        account = list(self.open_now.values())[index % len(self.open_now)]
        with pytest.raises(UsageError, match="two ceilings"):
            self.ledger.open(
                account.key,
                ceiling=account.granted + (1 if other else 0),
                keep=account.keep + (0 if other else 1),
                warn_mark=1,
                ends_at=1,
            )

    @precondition(lambda self: self.accounts)
    @rule(index=INDEX, amount=st.integers(1, 20))
    def top_up(self, index: int, amount: int) -> None:
        account = self.accounts[index % len(self.accounts)]
        before = self.changes
        balance = self.ledger.top_up(account.real, amount)
        account.ceiling += amount
        account.told = account.warned = False
        assert balance == account.balance()
        assert self.changes > before

    @precondition(lambda self: self.accounts)
    @rule(indexes=st.lists(INDEX, max_size=2))
    def forget(self, indexes: list[int]) -> None:
        """Taken out, but whoever has them goes on; what was opened since under the same key stays."""
        gone = [self.accounts[index % len(self.accounts)] for index in indexes]
        self.ledger.forget([account.real for account in gone])
        for account in gone:
            if self.open_now.get(account.key) is account:
                del self.open_now[account.key]

    @rule(wall=st.sampled_from([0, WINDOW_S - 1, WINDOW_S, 2 * WINDOW_S - 1, 2 * WINDOW_S]))
    def evict(self, wall: float) -> None:
        gone = [
            account
            for account in self.open_now.values()
            if not account.held and (account.ends_at <= wall or (not account.spent and account.ceiling == account.granted))
        ]
        assert self.ledger.evict(wall) == len(gone)
        for account in gone:
            account.is_closed = True
            del self.open_now[account.key]

    # -- reservations -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.accounts)
    @rule(
        indexes=st.lists(st.tuples(INDEX, st.sampled_from([True, True, True, False])), min_size=1, max_size=4),
        amounts=AMOUNTS,
        wrap_up=st.sampled_from([False, False, True]),
        tells=st.sampled_from([True, True, False]),
        hold_s=st.sampled_from([5.0, 20.0, math.inf]),
    )
    def reserve(self, indexes: list[tuple[int, bool]], amounts: Amounts, *, wrap_up: bool, tells: bool, hold_s: float) -> None:
        found = {self.accounts[index % len(self.accounts)]: enforced for index, enforced in indexes}
        lines = [(account, account.key.unit, enforced) for account, enforced in found.items()]
        reserve = self._reserver([Line(account.real, unit, enforced) for account, unit, enforced in lines], amounts, hold_s)
        verdict, refusing = self._verdict(lines, amounts, wrap_up=wrap_up)
        if verdict == "stale":
            with pytest.raises(StaleAccount):
                reserve(wrap_up=wrap_up)
            return
        answer = reserve(wrap_up=wrap_up)
        if refusing is not None:
            assert isinstance(answer, Refusal)
            line = Line(refusing.real, refusing.key.unit, enforced=True)
            assert answer == Refusal(line, refusing.balance(), amounts[refusing.key.unit], verdict)
            if tells and verdict == "exhausted":
                assert self.ledger.is_news(answer) == (not refusing.told)
                refusing.told = True
            elif tells and verdict == "too_large":
                assert self.ledger.is_news(answer) == (refusing.told_too_large != refusing.ceiling)
                refusing.told_too_large = refusing.ceiling
            return
        assert isinstance(answer, Hold)
        hold = ExpectedHold(answer, lines, amounts, self.now + hold_s)
        for account, unit, enforced in lines:
            account.held += amounts[unit]
            self.taken += amounts[unit]
            if not enforced:
                account.is_strict = account.is_strict and not amounts[unit]
                if not account.told and account.spent + account.held > account.ceiling:
                    account.told = True
                    hold.notices.append(("overshoot", account.key))
            elif not wrap_up and account.is_strict and amounts[unit]:
                assert account.spent + account.held <= account.ceiling - account.keep
        assert heard(answer.notices) == hold.notices
        assert (answer.state, answer.amounts, answer.charged, answer.owner) == ("open", amounts, None, self)
        self.holds.append(hold)

    def _reserver(self, lines: list[Line], amounts: Amounts, hold_s: float) -> Callable[..., Hold | Refusal]:
        return lambda **how: self.ledger.reserve(lines, amounts, expires_at=self.now + hold_s, owner=self, **how)

    def _verdict(self, lines: list[tuple[Expected, int, bool]], amounts: Amounts, *, wrap_up: bool) -> tuple[Any, Expected | None]:
        """The first that has no room for good refuses; else the first whose room is only held."""
        busy: Expected | None = None
        for account, unit, enforced in lines:
            if account.is_closed:
                return "stale", None
            if not enforced:
                continue
            needed, room = amounts[unit], account.ceiling - (0 if wrap_up else account.keep)
            if needed and account.spent + needed > room:
                return ("too_large" if account.spent < room < needed else "exhausted"), account
            if needed and account.spent + account.held + needed > room:
                busy = busy or account
        return ("busy", busy) if busy is not None else ("fits", None)

    @precondition(lambda self: self.holds)
    @rule(index=INDEX, share=st.sampled_from(["less", "equal", "more", "any"]), other=AMOUNTS)
    def settle(self, index: int, share: str, other: Amounts) -> None:
        """Also after a release or a charge, whose effect it corrects; a second time it does nothing."""
        hold = self._pick(index)
        amounts = {
            "less": tuple(min(a, b) for a, b in zip(hold.amounts, other, strict=True)),
            "equal": hold.amounts,
            "more": tuple(a + b for a, b in zip(hold.amounts, other, strict=True)),
            "any": other,
        }[share]
        before = self.changes
        notices = self.ledger.settle(hold.real, amounts)
        if hold.state == "settled":
            assert notices == []
            return
        assert heard(notices) == self._spend(hold, amounts, "settled")
        assert self.changes > before

    @precondition(lambda self: self.holds)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        hold = self._pick(index)
        before = self.changes
        self.ledger.release(hold.real)
        if hold.state != "open":
            return
        hold.state = "released"
        for account, unit, _ in hold.lines:
            account.held -= hold.amounts[unit]
            self.given_back += hold.amounts[unit]
        assert self.changes > before

    @precondition(lambda self: self.holds)
    @rule(index=INDEX)
    def charge(self, index: int) -> None:
        hold = self._pick(index)
        before = self.changes
        notices = self.ledger.charge(hold.real)
        if hold.state != "open":
            assert notices == []
            return
        assert heard(notices) == self._spend(hold, hold.amounts, "charged")
        assert self.changes > before

    @rule(seconds=st.sampled_from([1.0, 4.0, 5.0, 20.0]))
    def expire(self, seconds: float) -> None:
        """What is over exactly now is over."""
        self.now += seconds
        charged = self.ledger.expire(self.now)
        overdue = {id(hold.real): hold for hold in self.holds if hold.state == "open" and hold.expires_at <= self.now}
        assert {id(real) for real, _ in charged} == set(overdue)
        for real, notices in charged:
            hold = overdue.pop(id(real))
            assert heard(notices) == self._spend(hold, hold.amounts, "charged")

    def _spend(self, hold: ExpectedHold, amounts: Amounts, state: str) -> list[tuple[str, AccountKey]]:
        notices: list[tuple[str, AccountKey]] = []
        for account, unit, enforced in hold.lines:
            before = hold.charged[unit] if hold.charged is not None else 0
            if hold.state == "open":
                account.held -= hold.amounts[unit]
                self.given_back += hold.amounts[unit]
            account.is_strict = account.is_strict and amounts[unit] <= (hold.amounts[unit] if hold.state != "released" else 0)
            account.spent += amounts[unit] - before
            self.taken += amounts[unit]
            self.given_back += before
            if account.spent >= account.warn_mark and not account.warned:
                account.warned = True
                notices.append(("warning", account.key))
            was_within = account.spent - amounts[unit] + before <= account.ceiling
            if account.spent > account.ceiling and (not account.told or (enforced and was_within)):
                account.told = True
                notices.append(("overshoot", account.key))
        hold.state, hold.charged = state, amounts
        return notices

    # -- what always holds ------------------------------------------------------------------------------------------------

    @invariant()
    def every_balance_is_as_predicted(self) -> None:
        for account in self.accounts:
            balance = self.ledger.balance(account.real)
            assert balance == account.balance()
            assert account.real.closed == account.is_closed

    @invariant()
    def accounts_are_the_sum_of_their_holds(self) -> None:
        for account in self.accounts:
            balance = self.ledger.balance(account.real)
            of_it = [(hold, unit) for hold in self.holds for other, unit, _ in hold.lines if other is account]
            assert balance.held == sum(hold.real.amounts[unit] for hold, unit in of_it if hold.real.state == "open")
            assert balance.spent == sum(hold.real.charged[unit] for hold, unit in of_it if hold.real.charged is not None)
            assert balance.held >= 0
            assert balance.spent >= 0
            assert balance.free >= 0

    @invariant()
    def no_ceiling_is_passed(self) -> None:
        for account in self.accounts:
            balance = self.ledger.balance(account.real)
            if account.is_strict:
                assert balance.spent + balance.held <= balance.ceiling

    @invariant()
    def money_is_conserved(self) -> None:
        balances = [self.ledger.balance(account.real) for account in self.accounts]
        assert sum(balance.spent + balance.held for balance in balances) == self.taken - self.given_back

    @invariant()
    def open_holds_are_those_that_nobody_ended(self) -> None:
        assert set(map(id, self.ledger.holds())) == {id(hold.real) for hold in self.holds if hold.state == "open"}
        assert all(hold.real.state == hold.state for hold in self.holds)


@pytest.mark.slow
@pytest.mark.parametrize("make_ledger", SLOW_IN_A_FILE)
def test_balances_are_exact_in_any_order_of_operations(make_ledger: Callable[[], Ledger]) -> None:
    run_state_machine_as_test(
        lambda: LedgerMachine(make_ledger),
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
