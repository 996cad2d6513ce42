"""A ledger's file from outside, for people: what stands in it, and the two changes an operator may make while agents run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clevagent_core.budgets import UNITS
from clevagent_core.errors import UsageError
from clevagent_core.ledger.account import AccountKey, Balance
from clevagent_core.ledger.database import Database
from clevagent_core.ledger.owners import is_locked, owner_path
from clevagent_core.ledger.statements import MIGRATIONS
from clevagent_core.money import MAX_PICO, PICO_PER_USD

_LISTED = 10
"""How many accounts an error names."""


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
            "SELECT id, budget, unit, key, window, granted, ceiling, keep, spent, held, ends_at <= ? OR over_at IS NOT NULL "
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

    def top_up(self, record: AccountRecord, amount: int) -> int:
        """Raise a ceiling by ``amount`` (in the account's unit): runs that were refused go on. Gives the new ceiling.

        Raises:
            UsageError: it would be more than a ledger can hold, or the account has ended meanwhile.

        """
        with self._database.transaction() as execute:
            row = execute("SELECT ceiling FROM account WHERE id = ? AND over_at IS NULL", (record.id,)).fetchone()
            if row is None:
                raise UsageError(
                    f"The run of the account {record.balance.key.key!r} has ended meanwhile, so there is nothing to top up any more. "
                    "`clevagent ledger show` lists the accounts that are open."
                )
            ceiling = int(row[0]) + amount
            if ceiling > MAX_PICO:
                raise UsageError(
                    f"The ceiling of {record.balance.key.budget!r} would be more than a ledger can hold (64 bits: "
                    f"${MAX_PICO / PICO_PER_USD:,.0f}, or {MAX_PICO:,} tokens or calls), so nothing was changed. Give a smaller amount."
                )
            execute("UPDATE account SET ceiling = ?, told = 0, warned = 0 WHERE id = ?", (ceiling, record.id))
        return ceiling

    def reset(self, record: AccountRecord) -> bool:
        """Start an account from zero: nothing spent, nothing topped up, and runs that were refused go on. What calls in flight hold stays held.

        Tells whether it was still open.
        """
        with self._database.transaction() as execute:
            changed = execute(
                "UPDATE account SET spent = 0, ceiling = granted, told = 0, warned = 0 WHERE id = ? AND over_at IS NULL",
                (record.id,),
            )
            return bool(changed.rowcount)


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
        what = f"{budget!r}" + (f" for {key!r}" if key else "") + (f" with a limit in {unit}" if unit else "")
        raise UsageError(
            f"No open account of the budget {what} is in the ledger, so nothing was changed. {_what_there_is(open_now, budget)}"
        )
    return found


def listed(names: list[str]) -> str:
    """Write names one after another, and of many only the first."""
    return ", ".join(names[:_LISTED]) + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _what_there_is(open_now: list[AccountRecord], budget: str) -> str:
    if not open_now:
        return "It has no open account at all."
    own = [record.balance.key for record in open_now if record.balance.key.budget == budget]
    if own:
        names = [f"{key.key!r} in {UNITS[key.unit]}" for key in own]
        return f"It has: {listed(names)}."
    return f"There are: {listed(sorted({repr(record.balance.key.budget) for record in open_now}))}."


def _record(  # one row, in the order of the statement above
    id_: int, budget: str, unit: int, key: str, window: str, granted: int, ceiling: int, keep: int, spent: int, held: int,
    over: int | None,
) -> AccountRecord:  # fmt: skip
    return AccountRecord(
        id=id_,
        balance=Balance(AccountKey(budget, unit, key, window), ceiling, keep, spent, held),
        topped_up=ceiling - granted,
        is_over=bool(over),
    )


def _owner(path: Path, id_: int, pid: int, agent: str, started_at: float, calls: int) -> OwnerRecord:
    is_alive = is_locked(owner_path(path, id_))
    return OwnerRecord(pid=pid, agent=agent, started_at=started_at, is_alive=is_alive, calls_in_flight=calls)
