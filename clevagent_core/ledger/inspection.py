"""A ledger's file from outside, for people: what stands in it, and the two changes an operator may make while agents run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clevagent_core.budgets import UNITS
from clevagent_core.errors import UsageError
from clevagent_core.ledger.account import AccountKey, Balance
from clevagent_core.ledger.database import Database
from clevagent_core.ledger.sqlite import MIGRATIONS, is_locked, owner_path


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRecord:
    """One account as it stands in the file, in its own unit."""

    id: int
    balance: Balance
    topped_up: int
    """What was added to the ceiling that the budget has."""
    is_over: bool
    """Whether its window, or its run, has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRecord:
    """One process that uses the file."""

    pid: int
    agent: str
    started_at: float
    """Seconds since 1970 (UTC)."""
    is_alive: bool
    """What a dead one held is charged by the next process that looks."""
    calls_in_flight: int


class LedgerFile:
    """A file that agents may be using at this moment: every change is one transaction, and they see it with their next call."""

    def __init__(self, path: Path) -> None:
        """Open a file that exists.

        Raises:
            UsageError: there is none. LedgerError: it cannot be read, or is no ledger.

        """
        if not path.is_file():
            raise UsageError(
                f"There is no ledger at {str(path)!r}, so there is nothing to show or to change. Agents make it when they start with "
                "clevagent.init(ledger='sqlite:///...'); name their file with --ledger or CLEVAGENT_LEDGER."
            )
        self._database = Database(path, MIGRATIONS)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def accounts(self, now: float) -> list[AccountRecord]:
        """Read every account, by budget, key and window; ``now`` in seconds since 1970."""
        rows = self._database.read(
            "SELECT id, budget, unit, key, window, granted, ceiling, keep, spent, held, latched, ends_at <= ? OR over_at IS NOT NULL "
            "FROM account ORDER BY budget, key, window, unit",
            (now,),
        )
        return [_record(*row) for row in rows]

    def owners(self) -> list[OwnerRecord]:
        """Read which processes use the file."""
        rows = self._database.read(
            "SELECT owner.id, pid, agent, started_at, count(hold.id) FROM owner LEFT JOIN hold ON hold.owner = owner.id GROUP BY owner.id"
        )
        return [_owner(self._database.path, *row) for row in rows]

    def top_up(self, record: AccountRecord, amount: int) -> None:
        """Raise a ceiling by ``amount`` (in the account's unit) and open its latch."""
        with self._database as execute:
            execute("UPDATE account SET ceiling = ceiling + ?, latched = 0, told = 0, warned = 0 WHERE id = ?", (amount, record.id))

    def reset(self, record: AccountRecord) -> None:
        """Start an account from zero: nothing spent, nothing topped up, the latch open. What calls in flight hold stays held."""
        with self._database as execute:
            execute("UPDATE account SET spent = 0, ceiling = granted, latched = 0, told = 0, warned = 0 WHERE id = ?", (record.id,))


def choose(records: list[AccountRecord], budget: str, *, key: str | None, unit: str | None) -> list[AccountRecord]:
    """Find the open accounts of a budget.

    Raises:
        UsageError: there is none of that name, key and unit.

    """
    open_now = [record for record in records if not record.is_over]
    found = [
        record
        for record in open_now
        if record.balance.key.budget == budget
        and key in (None, record.balance.key.key)
        and unit in (None, UNITS[record.balance.key.unit])
    ]
    if not found:
        named = sorted({repr(record.balance.key.budget) for record in open_now})
        what = f"{budget!r}" + (f" for {key!r}" if key else "") + (f" with a limit in {unit}" if unit else "")
        raise UsageError(
            f"No open account of the budget {what} is in the ledger, so nothing was changed. "
            + (f"There are: {', '.join(named)}." if named else "It has no open account at all.")
            + " `clevagent ledger show` lists them with their keys."
        )
    return found


def _record(  # one row, in the order of the statement above
    id_: int, budget: str, unit: int, key: str, window: str, granted: int, ceiling: int, keep: int, spent: int, held: int,
    latched: int, over: int | None,
) -> AccountRecord:  # fmt: skip
    return AccountRecord(
        id=id_,
        balance=Balance(AccountKey(budget, unit, key, window), ceiling, keep, spent, held, bool(latched)),
        topped_up=ceiling - granted,
        is_over=bool(over),
    )


def _owner(path: Path, id_: int, pid: int, agent: str, started_at: float, calls: int) -> OwnerRecord:
    is_alive = is_locked(owner_path(path, id_))
    return OwnerRecord(pid=pid, agent=agent, started_at=started_at, is_alive=is_alive, calls_in_flight=calls)
