"""The tables of a ledger's file, and the statements that go over several accounts at once. Amounts are in the account's unit."""

from __future__ import annotations

from functools import cache

from clevagent_core.budgets import UNITS

MIGRATIONS = (
    """
    CREATE TABLE account (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        budget TEXT NOT NULL, unit INTEGER NOT NULL, key TEXT NOT NULL, window TEXT NOT NULL,
        granted INTEGER NOT NULL, ceiling INTEGER NOT NULL, keep INTEGER NOT NULL, warn_mark INTEGER NOT NULL,
        spent INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0,
        latched INTEGER NOT NULL DEFAULT 0, told INTEGER NOT NULL DEFAULT 0, warned INTEGER NOT NULL DEFAULT 0,
        opened_at REAL NOT NULL, ends_at REAL, over_at REAL, owner INTEGER
    );
    CREATE UNIQUE INDEX account_key ON account (budget, unit, key, window) WHERE over_at IS NULL;
    CREATE INDEX account_owner ON account (owner) WHERE owner IS NOT NULL;
    CREATE TABLE owner (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, agent TEXT NOT NULL, started_at REAL NOT NULL);
    CREATE TABLE hold (
        id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, accounts TEXT NOT NULL,
        usd INTEGER NOT NULL, tokens INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
        llm_calls INTEGER NOT NULL, tool_calls INTEGER NOT NULL
    );
    CREATE INDEX hold_owner ON hold (owner)
    """,
    """
    CREATE TABLE sample (
        id INTEGER PRIMARY KEY AUTOINCREMENT, agent TEXT NOT NULL, series TEXT NOT NULL, at REAL NOT NULL, value INTEGER NOT NULL
    );
    CREATE INDEX sample_series ON sample (agent, series, id)
    """,
)
"""Numbered from 1; one that was published is never changed. Amounts are in the account's unit: pico-USD, tokens or calls. ``ends_at``
is set where the calendar ends the window; ``over_at`` once the run is over that was the window; ``owner`` while that run is one
process's own. ``latched`` is neither read nor written: a latch belongs to the run that was refused, not to the account."""

MOST = 2**63 - 1
"""What a provider that is broken may report at most: SQLite's integers end there, and so do budgets."""
_ROW = "id, ceiling, keep, spent, held, told, warned"
# Without numbers, even where a value stands several times: CPython before 3.12.4 takes ?1 for a name, and warns of each use.
_AMOUNT = "CASE unit " + " ".join(f"WHEN {unit} THEN ?" for unit in range(len(UNITS))) + " END"
FIND = "SELECT id, granted, keep, owner FROM account WHERE budget = ? AND unit = ? AND key = ? AND window = ? AND over_at IS NULL"
INSERT_ACCOUNT = (
    "INSERT INTO account (budget, unit, key, window, granted, ceiling, keep, warn_mark, opened_at, ends_at, owner) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
INSERT_OWNER = "INSERT INTO owner (pid, agent, started_at) VALUES (?, ?, ?)"
INSERT_HOLD = "INSERT INTO hold VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
REMEMBER = "INSERT INTO sample (agent, series, at, value) VALUES (?, ?, ?, ?)"
SAMPLES = "SELECT value FROM sample WHERE agent = ? AND series = ? ORDER BY id DESC LIMIT ?"
FORGET_SAMPLES = (
    "DELETE FROM sample WHERE agent = ? AND series = ? AND id <= "
    "(SELECT id FROM sample WHERE agent = ? AND series = ? ORDER BY id DESC LIMIT 1 OFFSET ?)"
)
TELL = "UPDATE account SET told = 1 WHERE id = ? AND told = 0"
TOP_UP = "UPDATE account SET ceiling = ceiling + ?, told = 0, warned = 0 WHERE id = ?"
# What was topped up stays on top.
CHANGE_CEILING = (
    "UPDATE account SET ceiling = ceiling + ? - ?, granted = ?, keep = ?, warn_mark = ?, told = 0, warned = 0 WHERE id = ?"
)
EVICT = (
    "DELETE FROM account WHERE id IN (SELECT id FROM account WHERE held = 0 AND (over_at <= ? OR over_at IS NULL AND (ends_at <= ? OR "
    "opened_at <= ? AND spent = 0 AND ceiling = granted)) LIMIT ?)"
)


@cache
def reserve_sql(count: int) -> str:
    """Hold amounts (one for each unit), on as many of ``count`` accounts as have room: on fewer, and the call does not fit.

    Takes the amounts, the ids, and the amounts twice more.
    """
    return (
        f"UPDATE account SET held = held + {_AMOUNT} WHERE id IN ({_places(count)}) "
        f"AND ({_AMOUNT} = 0 OR spent + held + {_AMOUNT} <= ceiling - keep)"
    )


@cache
def settle_sql(count: int) -> str:
    """Take amounts (one for each unit) off what ``count`` accounts hold, and add others to what they have spent."""
    # Not below zero, where an operator has reset the account meanwhile.
    # Not with RETURNING, which takes four times as long as a second statement that reads.
    return (
        f"UPDATE account SET held = held - {_AMOUNT}, spent = max(0, min(spent + {_AMOUNT}, {MOST})) WHERE id IN ({_places(count)})"
    )


@cache
def select_sql(count: int) -> str:
    """Read ``count`` accounts."""
    return f"SELECT {_ROW} FROM account WHERE id IN ({_places(count)})"


def _places(count: int) -> str:
    return ", ".join("?" * count)
